"""Claims and verdicts: what the tests compute, and that no verdict rests on runs that do not belong together."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from report_fixtures import NUMERICS, write_record

from kalmannorm import report
from kalmannorm.experiments import cards
from kalmannorm.experiments.config import conf_dir
from kalmannorm.report import claims, hypotheses, quantities, speed, variants, verdicts
from kalmannorm.report.claims import Claim
from kalmannorm.report.hypotheses import Hypothesis
from kalmannorm.report.verdicts import Verdict

ON_CPU = ("dataset=digits", "device=cpu")
ROWS = {
    "bn": (*ON_CPU, "norm=bn"),
    "kn": (*ON_CPU, "norm=bkn"),
    "kn_output": (*ON_CPU, "norm=bkn", "norm.options.belief=output"),
}
BN, KN, KN_OUTPUT = (variants.composed(settings) for settings in ROWS.values())
CARDS = {"t": {"name": "t", "rows": [{"key": key, "label": key, "settings": {"": of}} for key, of in ROWS.items()]}}


def claim(*contrast: str, expect: str = "greater", **changes: Any) -> Claim:
    entry = {"id": "c", "text": "a claim", "where": "4.2", "contrast": list(contrast) or ["+t/kn", "-t/bn"]}
    return claims.parse({**entry, "expect": expect, **changes})


def judge(monkeypatch: pytest.MonkeyPatch, results: Path, *made: Claim) -> list[Verdict]:
    monkeypatch.setattr(verdicts, "claims", lambda: made or (claim(),))
    return verdicts.evaluate(report.records(results, NUMERICS), CARDS)


def write_pairs(results: Path, differences: list[float], of: Mapping[str, Any] = KN, **changes: Any) -> None:
    for seed, difference in enumerate(differences, 1):
        write_record(results, BN, seed, moving=90.0 + 0.3 * seed, **changes)
        write_record(results, of, seed, moving=90.0 + 0.3 * seed + difference, **changes)


# The tests


def test_p_values_are_scipys() -> None:
    from scipy import stats

    ours, theirs = np.random.default_rng(0).normal([[91], [90]], 1, (2, 6))
    values = list(ours - theirs)
    for expect in ("greater", "less"):
        outcome = hypotheses.examine(Hypothesis(expect), values)
        assert outcome.p == pytest.approx(stats.ttest_rel(ours, theirs).pvalue)
        assert outcome.in_favour == ((expect == "greater") == (np.mean(values) > 0))
    shifted = hypotheses.examine(Hypothesis("greater", than=-2), values)
    assert shifted.p == pytest.approx(stats.ttest_1samp(values, -2).pvalue)


def test_equivalence_is_two_one_sided_tests() -> None:
    from scipy import stats

    values = [0.1, -0.05, 0.12, 0.02, -0.1]
    outcome = hypotheses.examine(Hypothesis("equal", margin=0.3), values)
    upper = stats.ttest_1samp(values, 0.3, alternative="less").pvalue
    lower = stats.ttest_1samp(values, -0.3, alternative="greater").pvalue
    assert outcome.in_favour and outcome.p == pytest.approx(2 * max(upper, lower)) and outcome.p < 0.05
    apart = hypotheses.examine(Hypothesis("equal", margin=0.3), [1.0, 1.1, 0.9, 1.05])
    assert not apart.in_favour and apart.p is not None and apart.p < 0.01
    wide = hypotheses.examine(Hypothesis("equal", margin=0.3), [1.0, -1.1, 0.9, -1.05])
    assert wide.p is not None and wide.p > 0.05  # no difference shown, but no equality either


@pytest.mark.parametrize(("effect", "seeds"), [(1.0, 10), (0.5, 34)])  # textbook sizes of a paired t-test
def test_needed_seeds(effect: float, seeds: int) -> None:
    outcome = hypotheses.examine(Hypothesis("greater"), [effect - 1 / np.sqrt(2), effect + 1 / np.sqrt(2)])
    assert hypotheses.needed(Hypothesis("greater"), outcome, 1) == seeds
    corrected = hypotheses.needed(Hypothesis("greater"), outcome, 20)
    assert corrected is not None and corrected > seeds
    nothing = hypotheses.examine(Hypothesis("greater"), [-1.0, 1.0])
    assert hypotheses.needed(Hypothesis("greater"), nothing, 1) is None


def test_needed_seeds_of_an_equivalence() -> None:
    """Were the mean 0 and the spread the margin's, that many seeds show equality in four of five experiments."""
    equal = Hypothesis("equal", margin=1.0)
    outcome = hypotheses.examine(equal, [-1 / np.sqrt(2), 1 / np.sqrt(2)])
    seeds = hypotheses.needed(equal, outcome, 1)
    assert seeds is not None and seeds > 10  # 10: the textbook's for one test of that size
    draws = np.random.default_rng(0).normal(0, 1, (400, seeds))
    shown = [found.p < 0.05 for row in draws if (found := hypotheses.examine(equal, list(row))).p is not None]
    assert np.mean(shown) == pytest.approx(0.8, abs=0.06)


def test_holm() -> None:
    assert hypotheses.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert hypotheses.holm([]) == [] and hypotheses.holm([0.9, 0.8]) == [1.0, 1.0]


def test_no_spread_is_no_evidence() -> None:
    assert hypotheses.examine(Hypothesis("greater"), [1.0]).p is None
    assert hypotheses.examine(Hypothesis("greater"), [1.0, 1.0, 1.0]).p is None


# The claims


def test_claims_are_whole() -> None:
    found = claims.claims()
    assert len({c.id for c in found}) == len(found) > 40
    for c in found:
        assert c.contrast and c.where and c.unit is not None
        assert (c.hypothesis.expect == "equal") == (c.hypothesis.margin > 0)
        assert c.margin_why or (c.hypothesis.margin == 0 and c.hypothesis.than == 0), f"{c.id}: whose bound is it?"
        assert not c.relative or sorted(term.sign for term in c.contrast) == [-1, 1]
    assert {said for c in found for said in c.conflicts} <= set(claims.conflicts())


def test_claims_name_rows_of_the_cards() -> None:
    folder = conf_dir() / "experiment"
    for term in {term for c in claims.claims() for term in c.contrast}:
        path = folder / f"{term.card}.yaml"
        card = yaml.safe_load(path.read_text())
        if any("sweep" in row for row in card["rows"]):
            card = cards.load(term.card, ["device=cpu", "seeds=1"]).card
        assert term.row in [row["key"] for row in card["rows"]], f"{term} is no row of {path.name}"
        if term.column:
            assert term.column in [column["key"] for column in card["columns"]]


# Verdicts


def test_supported_and_contradicted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_pairs(tmp_path, [1.5, 1.6, 1.4, 1.5, 1.55])
    holds, fails, bounded = judge(
        monkeypatch, tmp_path, claim(), claim(expect="less"), claim(expect="equal", margin=0.3, margin_why="w")
    )
    assert (holds.state, fails.state, bounded.state) == ("supported", "contradicted", "contradicted")
    assert holds.outcome is not None and holds.outcome.summary.mean == pytest.approx(1.51) and holds.tests == 3
    assert holds.values == pytest.approx({1: 1.5, 2: 1.6, 3: 1.4, 4: 1.5, 5: 1.55})
    assert len(holds.ids) == 10 and set(holds.ids) <= {p.stem for p in (tmp_path / "records").glob("*.json")}
    rests = "; ".join(holds.rests_on)
    for part in (
        "budget lite (7 epochs",
        "schedule released",
        "data 1,797 of 1,797 exact",
        "preset paper, predictor closed form, initial gain 0.5 (learned)",
        "initial gain is ours",
        "one learning-rate schedule",
        "fp32",
        "seeds 1, 2, 3, 4, 5",
    ):
        assert part in rests


def test_too_few_seeds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_pairs(tmp_path, [1.5])
    (single,) = judge(monkeypatch, tmp_path)
    assert single.state == "undecided" and "at least 2" in single.why
    write_pairs(tmp_path, [1.5, -1.4, 0.9])
    (three,) = judge(monkeypatch, tmp_path)
    assert three.state == "undecided" and "leans to the claim" in three.why and "seeds would decide" in three.why


def test_correction_decides(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What a single test would support stays open as one of twenty."""
    write_pairs(tmp_path, [1.5, 1.0, 2.0])
    (single,) = judge(monkeypatch, tmp_path)
    assert single.state == "supported"
    many = judge(monkeypatch, tmp_path, *[claim()] * 20)
    assert {verdict.state for verdict in many} == {"undecided"} and "single test it would be decided" in many[0].why


def test_nothing_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = (claim(), claim("+t/kn_outptu"), claim("+nowhere/a"), claim("+t/kn@x"))
    found = judge(monkeypatch, tmp_path, *made)
    assert {verdict.state for verdict in found} == {"not run"}
    nothing, misspelt, no_card, no_column = [verdict.why for verdict in found]
    assert nothing == "no run of any side" and "did you mean 'kn_output'" in misspelt
    assert "no card nowhere yet" in no_card and "column" in no_column
    write_record(tmp_path, KN, 1)
    (one_sided,) = judge(monkeypatch, tmp_path)
    assert (one_sided.state, one_sided.why) == ("not run", "no finished run of t/bn (moving)")


def test_budgets_and_data_sets_are_never_mixed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_pairs(tmp_path, [1.5, 1.6, 1.4])
    others = [
        {"budget": {**BN["budget"], "epochs": 9}},
        {"budget": variants.composed(ROWS["bn"], "digits", "paper")["budget"]},
        {"dataset": {**BN["dataset"], "name": "cifar10", "flip": True}},
    ]
    for changes in others:
        write_pairs(tmp_path, [-1.5, -1.6, -1.4], **changes)
    smoke = {"budget": {**BN["budget"], "name": "smoke", "epochs": 1}}
    write_pairs(tmp_path, [-9.0, -9.1], **smoke)
    found = {(v.dataset, v.reduced): v for v in judge(monkeypatch, tmp_path)}
    assert {key: (v.state, len(v.ids)) for key, v in found.items()} == {
        ("digits", ""): ("contradicted", 6),  # the papers' length: conf/'s budget "paper"
        ("digits", "at budget lite"): ("supported", 6),
        ("digits", "at budget lite (epochs=9)"): ("contradicted", 6),
        ("cifar10", "at budget lite (epochs=7, subset=null)"): ("contradicted", 6),
    }
    assert len({i for v in found.values() for i in v.ids}) == 24


def test_arithmetic_and_data_are_never_mixed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        write_record(tmp_path, BN, seed, moving=90.0)
        write_record(tmp_path, KN, seed, moving=91.0 + 0.1 * seed, precision="bf16")
    (nothing_common,) = judge(monkeypatch, tmp_path)
    assert nothing_common.state == "undecided" and "same arithmetic and data" in nothing_common.why
    for seed in (1, 2):
        write_record(tmp_path, KN, seed, moving=91.0 + 0.1 * seed)
    (common,) = judge(monkeypatch, tmp_path)
    assert list(common.values) == [1, 2] and "fp32" in common.rests_on
    assert any("other arithmetic" in note for note in common.notes) and any("not all sides" in n for n in common.notes)


def test_data_of_other_fidelity(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for seed in (1, 2):
        write_record(tmp_path, BN, seed)
        write_record(tmp_path, KN, seed, sha256="e" * 64)
    (verdict,) = judge(monkeypatch, tmp_path)
    assert verdict.state == "undecided" and not verdict.ids


def test_stale_runs_do_not_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_pairs(tmp_path, [1.5, 1.6])
    for of in (BN, KN):
        write_record(tmp_path, of, 3, moving=10.0, numerics=NUMERICS - 1)
    (verdict,) = judge(monkeypatch, tmp_path)
    assert list(verdict.values) == [1, 2]


@pytest.mark.parametrize("sides", [[KN], [BN], [KN, BN]])
def test_survivors_alone_decide_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sides: list[Any]) -> None:
    write_pairs(tmp_path, [1.5, 1.6, 1.4, 1.5])
    for of in sides:
        write_record(tmp_path, of, 5, failed="the loss is not finite")
    (verdict,) = judge(monkeypatch, tmp_path)
    assert verdict.state == "undecided" and verdict.why.startswith("in favour, but t/")
    assert "1 of 5 runs failed: the loss is not finite (seed 5)" in verdict.why and len(verdict.notes) == len(sides)
    for of in sides:
        write_record(tmp_path, of, 5, moving=91.5 + (of is KN) * 1.5)
        write_record(tmp_path, of, 5, failed="out of memory", precision="bf16")  # another arithmetic's failure
    write_pairs(tmp_path, [1.5, 1.6, 1.4, 1.5, 1.55])
    (verdict,) = judge(monkeypatch, tmp_path)
    assert verdict.state == "supported"


def test_a_side_of_failures_is_no_silence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_record(tmp_path, BN, 1)
    failed = write_record(tmp_path, KN, 1, failed="the loss is not finite")
    (verdict,) = judge(monkeypatch, tmp_path)
    assert (verdict.state, verdict.ids) == ("undecided", (failed,))
    assert verdict.why == "t/kn (moving): 1 of 1 run failed: the loss is not finite (seed 1)"


def test_what_did_not_learn_shows_no_equality(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """At chance the statistics agree, and so do networks. That only one learns is a difference."""
    for seed in (1, 2, 3, 4):
        write_record(tmp_path, KN, seed, moving=10.0, online=10.0 + seed / 1000)
        write_record(tmp_path, BN, seed, moving=80.0 + seed, online=82.0 + 1.1 * seed)
        write_record(tmp_path, KN_OUTPUT, seed, moving=10.5 + seed / 1000, online=10.1)
    equal = claim("+t/kn online", "-t/kn moving", expect="equal", margin=0.3, margin_why="w")
    found = judge(
        monkeypatch, tmp_path, equal, claim(quantity="gap", expect="less"), claim("+t/kn", "-t/kn_output"), claim()
    )
    assert [verdict.state for verdict in found] == ["undecided"] * 3 + ["contradicted"]
    for verdict in found[:3]:
        assert "but networks did not learn" in verdict.why
    assert all(any("no better than chance" in note for note in verdict.notes) for verdict in found)


def test_schedules_and_widths_are_one_family(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Else a claim could be tried with rate after rate until one supports it."""
    for rate in range(1, 11):
        schedule = {**BN["schedule"], "lr": [[1, rate / 100]]}
        write_pairs(tmp_path, [1.5, 1.0, 2.0], schedule=schedule)
    found = judge(monkeypatch, tmp_path)
    assert len(found) == 10 and {(verdict.state, verdict.tests) for verdict in found} == {("undecided", 10)}
    assert all("one of 10 learning-rate schedules that were run" in verdict.rests_on for verdict in found)
    other = {**BN["dataset"], "name": "cifar10", "flip": True}
    write_pairs(tmp_path, [1.5, 1.0], dataset=other)
    (of_other,) = (verdict for verdict in judge(monkeypatch, tmp_path) if verdict.dataset == "cifar10")
    assert "one learning-rate schedule" in of_other.rests_on


def test_a_claim_of_one_data_set_and_of_one_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    curves = {"epoch": [1, 2, 3], "step": [60, 120, 170], "online": [50.0, 50.0, 50.0]}
    for seed in (1, 2, 3):
        write_record(tmp_path, BN, seed, curves={**curves, "moving": [20.0, 40.0, 60.0 + seed]})
        write_record(tmp_path, KN, seed, curves={**curves, "moving": [20.0, 42.0 + seed / 10, 50.0]})
    early, end, elsewhere, here = judge(
        monkeypatch,
        tmp_path,
        claim(at=[120, 170]),
        claim(),
        claim(datasets=["cifar10"]),
        claim(datasets=["digits"]),
    )
    with pytest.raises(ValueError, match="only an accuracy"):
        claim(at=[120, 170], quantity="gap")
    assert early.values == pytest.approx({1: 2.1, 2: 2.2, 3: 2.3}) and early.state == "supported"
    assert end.state == here.state == "contradicted"
    assert (elsewhere.state, elsewhere.why) == ("not run", "no run of any side")


def test_a_speed_is_that_of_alternating_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Not that of whole runs, which other work on the machine decides."""
    monkeypatch.setattr(verdicts, "claims", lambda: (made,))
    made = claim("+table3/bn", "-table3/kn", quantity="speed", relative=True, expect="less", than=5, margin_why="w")
    card = cards.load("table3", ["device=cpu", "seeds=1"]).card
    found = report.records(tmp_path, NUMERICS)
    (nothing,) = verdicts.evaluate(found, {"table3": card})
    assert nothing.state == "not run"
    (tmp_path / "speed").mkdir()
    for name, more in (("a", 1.01), ("b", 1.2), ("c", 1.05)):
        seconds = {"bn": [1.0, 1.1, 1.0, 1.2], "kn": [more, 1.1 * more, 1.02 * more, 1.16 * more]}
        measurement = {
            "id": name,
            "experiment": "table3",
            "configs": {row["key"]: speed.measured_part(row["config"], name == "c") for row in card["rows"]},
            "seconds": seconds,
            "host": {"hardware": "a machine", "threads": 1, "device": "cpu"},
        }
        (tmp_path / "speed" / f"{name}.json").write_text(json.dumps(measurement))
    of = {verdict.rests_on[-1].split()[1]: verdict for verdict in verdicts.evaluate(found, {"table3": card})}
    assert {name: verdict.state for name, verdict in of.items()} == {
        "a": "supported",
        "b": "contradicted",
        "c": "undecided",
    }
    assert of["a"].estimate == "+1.00 %"
    assert "on a machine, 1 thread" in of["a"].reduced and "224x224 px" in of["a"].reduced
    (tmp_path / "speed" / "d.json").write_text("{}")
    (broken,) = verdicts.evaluate(found, {"table3": card})
    assert broken.state == "not run" and "d.json is not a whole measurement" in broken.why


def test_branches_of_a_block_are_equally_deep() -> None:
    layers = ["stem.bn", "blocks.0.b1.bn", "blocks.0.b3.0.bn", "blocks.0.pool.bn", "blocks.1.b1.bn", "bn_last"]
    assert quantities._depths(layers) == [0, 1, 1, 1, 2, 3]
    assert quantities._depths(["1", "2", "3"]) == [0, 1, 2]  # layers without names


def test_other_quantities(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for seed in (1, 2):
        write_record(tmp_path, BN, seed, moving=90.0, online=91.0 + seed, arrays=True)
        write_record(tmp_path, KN, seed, moving=90.0, online=90.5, arrays=True)
    gap, absolute, relative = judge(
        monkeypatch,
        tmp_path,
        claim(quantity="gap", expect="less"),
        claim(quantity="variance_gap", relative=True, expect="less"),
        claim(quantity="relative_variance_gap", relative=True, expect="less"),
    )
    assert gap.values == pytest.approx({1: 0.5 - 2, 2: 0.5 - 3})
    assert set(absolute.values) == set(relative.values) == {1, 2} and relative.values[1] < -30


def test_quantities_of_the_mechanism(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = [claim("+t/kn", quantity=f"posterior_error_{moment}", expect="less") for moment in ("mean", "var")]
    shares = [claim("+t/kn", "-t/bn", quantity=f"{name}_share") for name in ("ln", "bn")]
    for seed in (1, 2, 3):
        for of, weights in ((BN, [0.1, 0.2, 0.7]), (KN, [0.1, 0.6 + seed / 100, 0.3 - seed / 100])):
            path = tmp_path / "records" / f"{write_record(tmp_path, of, seed, errors=True)}.json"
            record = json.loads(path.read_text())
            record["norms"]["mixture"] = {"a": {"mean": weights, "var": weights}}
            path.write_text(json.dumps(record))
    mean, var, more, less = judge(monkeypatch, tmp_path, *made, *shares)
    # The fixtures' errors: sqrt(0.2^2 + 0.2^2) of the posterior, sqrt(0.01^2 + 0.4^2) of the measurement.
    assert mean.values == var.values == pytest.approx(dict.fromkeys((1, 2, 3), 100 * (0.08 / 0.1601) ** 0.5 - 100))
    assert mean.state == "undecided" and "no spread" in mean.why and mean.estimate.startswith("−29.31 %")
    assert more.values == pytest.approx({1: 41, 2: 42, 3: 43}) and more.state == "supported"
    assert less.values == pytest.approx({1: -41, 2: -42, 3: -43}) and less.state == "contradicted"
    write_record(tmp_path, KN, 4, arrays=True)  # arrays of an earlier version: no errors
    write_record(tmp_path, BN, 4, arrays=True)
    mean, _, more, _ = judge(monkeypatch, tmp_path, *made, *shares)
    assert list(mean.values) == [1, 2, 3] and any("seed 4 left out" in note for note in (*mean.notes, *more.notes))


def test_the_input_s_belief_shows_in_the_first_normalizer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = claim("+t/kn", quantity="first_error_var", expect="less")
    identities = [write_record(tmp_path, KN, seed, errors=True) for seed in (1, 2)]
    (verdict,) = judge(monkeypatch, tmp_path, made)
    assert verdict.state == "not run"  # no prior there, so that its posterior is its measurement
    for identity, prior in zip(identities, (0.1, 0.3), strict=True):
        path = tmp_path / "records" / f"{identity}.npz"
        arrays = dict(np.load(path))
        arrays["layer_error_var"][:, 0] = 0.4, prior, 0.4 * (1 - prior)
        np.savez(path, **arrays)
    (verdict,) = judge(monkeypatch, tmp_path, made)
    assert verdict.values == pytest.approx({1: -10, 2: -30})


def test_parameters_are_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without a run: small Inception, KN's gains and R."""
    rows = cards.load("table7", ["device=cpu", "seeds=1", "rows=bn_stat2,kn_stat2"]).card["rows"]
    few, fewer = (
        claim("+t/kn_stat2", "-t/bn_stat2", quantity="parameters", relative=True, expect="less", than=than)
        for than in (0.2, 0.1)
    )
    monkeypatch.setitem(CARDS, "t", {"name": "t", "rows": rows})
    found = judge(monkeypatch, tmp_path, few, fewer)
    assert [verdict.state for verdict in found] == ["supported", "contradicted"]
    assert found[0].estimate == f"+{100 * (904_701 / 903_018 - 1):.2f} %" and not found[0].ids
    assert any("904,701" in said for said in found[0].rests_on)


def test_steps_saved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    curves = {"epoch": [1, 2, 3, 4], "step": [100, 200, 300, 400], "online": [0, 0, 0, 0]}
    bn, quick, slow = [50.0, 60.0, 70.0, 80.0], [50.0, 81.0, 70.0, 82.0], [50.0, 60.0, 70.0, 79.0]

    def write(of: Mapping[str, Any], seed: int, moving: list[float]) -> None:
        write_record(tmp_path, of, seed, moving=moving[-1], curves={**curves, "moving": moving})

    for seed in (1, 2, 3):
        write(BN, seed, bn)
        write(KN, seed, quick if seed < 3 else [50.0, 60.0, 80.0, 82.0])
        write(KN_OUTPUT, seed, slow if seed == 1 else quick)
    faster, never = judge(
        monkeypatch,
        tmp_path,
        claim(quantity="steps_saved"),
        claim("+t/kn_output", "-t/bn", quantity="steps_saved"),
    )
    assert faster.values == {1: 50.0, 2: 50.0, 3: 25.0}
    assert never.values == {1: 0.0, 2: 50.0, 3: 50.0} and never.state == "undecided"
    assert any("never reaches" in note for note in never.notes)
