"""benchmarks/bench.py: what can be said of it without measuring times."""

import json
from pathlib import Path

import bench
import pytest
import torch
from helpers import quick


@pytest.mark.parametrize("images", quick([8, 128], 8))
def test_kn_keeps_no_more_for_backward_than_bn(images: int) -> None:
    kept = [bench.saved_bytes(bench._resnet18(norm), torch.device("cpu"), images) for norm in ("bkn", "bn")]
    assert 1 < kept[0] / kept[1] <= 1.05


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "soon"])
def test_seconds_have_a_range(seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        bench.main(["--seconds", seconds])
    assert ended.value.code == 2 and "argument --seconds" in capsys.readouterr().err


def test_an_unknown_comparison_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["knn"]) == 2
    assert "unknown comparison 'knn'" in capsys.readouterr().err


def test_ratios_are_kept_with_the_machine_and_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, ratios in (("kn", [1.05, 1.1, 1.15]), ("loop", [0.9]), ("sampling", [2.0])):
        monkeypatch.setitem(bench._MEASURE, name, lambda device, seconds, found=ratios: (found, "9 ms against 8 ms"))
    assert bench.main(["kn", "sampling", "--results", str(tmp_path)]) == 0
    assert bench.main(["loop", "--results", str(tmp_path)]) == 1  # its goal is missed
    assert "goal >= 0.95: missed" in capsys.readouterr().out
    kept = json.loads((tmp_path / "bench" / "kn.json").read_text())
    assert kept["ratios"] == [1.05, 1.1, 1.15] and kept["host"]["git"].keys() == {"commit", "dirty"}
    of_kn, of_sampling, of_loop = (tmp_path / "bench" / "README.md").read_text().splitlines()[5:]
    assert "| 1.100 [1.050, 1.150] n = 3 | <= 1.12: met | 9 ms against 8 ms |" in of_kn
    assert "| 2.000 |  |" in of_sampling and "| 0.900 | >= 0.95: missed |" in of_loop
