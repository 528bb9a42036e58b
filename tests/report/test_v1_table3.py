"""The widths of v1's Table 3: BN networks with v1's ratio of parameters, and with those that preset v1 has here.

`python tests/report/test_v1_table3.py` computes them.
"""

import re
from bisect import bisect_left

import pytest
from helpers import quick

from kalmannorm.experiments.card import overrides, read
from kalmannorm.experiments.config import Config, compose
from kalmannorm.report import paper
from kalmannorm.train.model import parameter_count

BASE = ["dataset=cifar100", "arch=inception_cifar", "device=cpu"]
ROWS = {row.key: row for row in read("v1-table3").rows}


def matching_width(config: Config, parameters: float) -> float:
    """The width, in thousandths, at which the network of `config` comes closest to a number of parameters."""
    result = config.result()

    def count(thousandths: int) -> int:
        return parameter_count({**result, "arch": {**result["arch"], "width": thousandths / 1000}})

    above = bisect_left(range(4000), parameters, lo=1, key=count)
    return min((above - 1, above), key=lambda width: abs(count(width) - parameters)) / 1000


def targets() -> dict[str, float]:
    """Parameters that the rows are widened to."""
    bn, kn = (
        parameter_count(compose([*BASE, *norm]).result()) for norm in (["norm=bn"], ["norm=bkn", "norm.preset=v1"])
    )
    return {"bn_stat2_widened": bn * 52 / 49, "bn_stat2_widened_as_here": kn, "bn_stat128_widened": bn * 52 / 49}


@pytest.mark.parametrize("key", quick(["bn_stat2_widened", "bn_stat2_widened_as_here"], "bn_stat2_widened_as_here"))
def test_widths_match_parameters(key: str) -> None:
    config = compose([*BASE, *overrides(ROWS[key].runs)])
    target, found = targets()[key], parameter_count(config.result())
    assert config.arch.options["width"] == matching_width(config, target)
    assert abs(found / target - 1) < 0.005
    ratio = found / parameter_count(compose([*BASE, "norm=bn"]).result())
    said = re.search(r"parameters x ([\d.]+)", ROWS[key].label)
    assert said and float(said[1]) == round(ratio, 3)


def test_rows_that_are_compared_differ_in_width_alone() -> None:
    for key in ("bn_stat2", "bn_stat128"):
        assert ROWS[f"{key}_widened"].runs == {**ROWS[key].runs, "arch.width": 1.031}
    assert ROWS["kn_stat2"].runs == {"norm": "bkn", "norm.preset": "v1", "batch": "g128_s2"}


def test_paper_values_are_found() -> None:
    printed = {
        "cifar10_online": {"bn": 90.0, "bkn": 90.9},
        "cifar10": {"bn": 89.4, "bkn": 90.9, "baseline": 92.1},
        "cifar100": {"bn": 63.8, "bkn": 67.3, "baseline": 70.5},
        "widened": {"bn_widened_to_the_parameters_of_bkn": 63.1, "baseline_widened": 70.1},
    }
    for column, values in printed.items():
        where = "cifar100" if column == "widened" else column
        for row, value in values.items():
            path = f"v1.table3.{{column}}.{row}"
            assert path in {found.paper for found in ROWS.values()}
            assert paper.printed(path.format(column=where)) == value


if __name__ == "__main__":
    for key, target in targets().items():
        print(f"{key}: arch.width={matching_width(compose([*BASE, 'norm=bn']), target)}")
