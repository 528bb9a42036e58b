"""The claims: whole, of rows that there are, and decided by one rule."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from records import config, table7, write_record

from kalmannorm import report
from kalmannorm.experiments.config import conf_dir
from kalmannorm.report import claims, page, paper, quantities
from kalmannorm.report.cells import Cells, Group
from kalmannorm.report.claims import Claim, Verdict, decide
from kalmannorm.report.effects import Effect

KN_OVER_BN = ("+table7/kn_stat2", "-table7/bn_stat2")


def claim(contrast: tuple[str, ...] = KN_OVER_BN, expect: str = "greater", **changes: Any) -> Claim:
    tree = {"id": "one", "text": "One.", "where": "here", "contrast": contrast, "expect": expect, **changes}
    return claims._claim(tree)


def judged(monkeypatch: pytest.MonkeyPatch, results: Path, *of: Claim) -> list[Verdict]:
    monkeypatch.setattr(claims, "claims", lambda: of)
    return claims.evaluate(Cells(report.load(results)), results)


def test_claims_are_whole() -> None:
    known = claims.claims()
    assert len({found.id for found in known}) == len(known) > 100
    for found in known:
        assert found.text.endswith(".") and found.where
        assert found.expect in ("greater", "less", "equal") and (found.margin > 0) == (found.expect == "equal"), (
            found.id
        )
        own_bound = found.than or found.margin
        assert not own_bound or found.margin_why or found.paper == own_bound, found.id
        for beginning in found.conflict:
            assert any(said.startswith(beginning) for said in paper.conflicts()), (found.id, beginning)
        for dataset in found.of:
            assert (conf_dir() / "dataset" / f"{dataset}.yaml").exists(), (found.id, dataset)
    assert sum(bool(found.answer) for found in known) >= 3
    assert all(found.network for found in known if found.answer)


def test_claims_name_rows_of_the_cards() -> None:
    for found in claims.claims():
        for term in found.contrast:
            assert term.identity.network, (found.id, str(term))


def test_printed_values_are_differences_of_printed_numbers() -> None:
    """What a claim says that the paper prints is what its rows print."""
    checked = 0
    for found in claims.claims():
        if (
            found.quantity not in ("accuracy", "shift")
            or found.at
            or not isinstance(found.paper, dict)
            or found.than > 50
        ):
            continue
        if any(term.statistics == "online" and term.card.name == "table8" for term in found.contrast):
            continue  # of Table 7, whose runs these are
        for dataset, value in found.paper.items():
            terms = []
            signed = [(term, term.sign, term.statistics) for term in found.contrast]
            signed += [(term, -sign, "moving") for term, sign, _ in signed if found.quantity == "shift"]
            for term, sign, statistics in signed:
                card, row = term.card, term.row
                of_statistics = statistics if card.name in ("table4", "table7") else dataset
                column = term.column.key if term.column else of_statistics
                path = row.paper or (f"{card.paper}.{row.key}" if card.paper else "")
                printed = (
                    paper.printed(path.format(column=column) if "{column}" in path else f"{path}.{column}")
                    if path
                    else None
                )
                terms.append(None if printed is None else sign * printed)
            if None not in terms:
                assert sum(terms) == pytest.approx(value, abs=0.011), found.id  # type: ignore[arg-type]
                checked += 1
    assert checked > 30


# The rule


@pytest.mark.parametrize(
    ("expect", "interval", "state"),
    [
        ("greater", (0.1, 2.0), "supported"),
        ("greater", (-0.1, 2.0), "open"),
        ("greater", (-2.0, -0.1), "contradicted"),
        ("less", (-2.0, -0.1), "supported"),
        ("less", (0.1, 2.0), "contradicted"),
        ("equal", (-0.2, 0.2), "supported"),
        ("equal", (-0.2, 0.4), "open"),
        ("equal", (0.4, 0.9), "contradicted"),
    ],
)
def test_the_interval_against_the_bound(expect: str, interval: tuple[float, float], state: str) -> None:
    of = claim(expect=expect, **({"margin": 0.3} if expect == "equal" else {}))
    assert decide(of, *interval) == state


def test_bounds_of_logarithms_are_percent() -> None:
    of = claim(("+figure5/kn_stat2", "-figure5/bn_stat2"), "less", quantity="gap_measured", than=-20)
    assert decide(of, math.log(0.5), math.log(0.79)) == "supported"
    assert decide(of, math.log(0.5), math.log(0.81)) == "open" and of.percent(math.log(0.5)) == pytest.approx(-50)


def test_supported_contradicted_and_their_numbers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table7(tmp_path)
    for of in range(3):  # a spread that is not 0
        write_record(tmp_path, config("gn"), of + 1, 61.0 + 0.3 * (of % 2))
    better, worse, near = judged(
        monkeypatch, tmp_path, claim(), claim(expect="less"), claim(expect="greater", than=1.999, margin_why="x")
    )
    assert (better.state, worse.state, near.state) == ("supported", "contradicted", "open")
    assert better.effect is not None and better.effect.mean == pytest.approx(2) and better.effect.n == 3
    assert better.low < 2 < better.high and better.family == 3
    assert better.effect.half_width(3) == pytest.approx(2 - better.low) and len(better.ids) == 6
    assert "seeds of these rows" in near.why


def test_a_column_may_fix_the_data_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table7(tmp_path)
    pair = ("+table8/inception_kn_stat2@cifar10", "-table8/inception_bn_stat2@cifar10")
    fixed, named = judged(monkeypatch, tmp_path, claim(pair), claim())
    assert fixed.effect is not None and fixed.effect == named.effect


def test_a_shift_is_from_the_same_run_s_moving_statistics(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pair = ("+table7/kn_stat2 online", "-table7/bn_stat2 online")
    for seed in (1, 2, 3):
        write_record(tmp_path, config("bn"), seed, 80.0 + seed, 77.0 + seed)
        write_record(tmp_path, config("bkn"), seed, 90.0 - 2 * seed, 89.0 - 2 * seed)
    (found,) = judged(monkeypatch, tmp_path, claim(pair, quantity="shift"))
    assert found.effect is not None and found.effect.seeds == pytest.approx([2, 2, 2])
    assert found.effect.mean == pytest.approx(-1 - -3)


def test_one_seed_decides_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_record(tmp_path, config("bn"), 1, 60.0)
    write_record(tmp_path, config("bkn"), 1, 90.0)
    (found,) = judged(monkeypatch, tmp_path, claim())
    assert (
        found.state == "open"
        and "no interval: 0 of at least 3 degrees of freedom" in found.why
        and found.estimate.startswith("+30.00 points")
    )


def test_nothing_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_record(tmp_path, config("bn"), 1)
    nothing, half = judged(monkeypatch, tmp_path, claim(("+table1/kn@resnet50", "-table1/bn@resnet50")), claim())
    assert nothing.state == half.state == "not run" and "+ table7/kn_stat2" in half.why


def test_other_settings_are_explored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The family is the papers' claims in their settings at one budget; the rest has an interval for itself alone."""
    narrow = {"arch": {**config()["arch"], "width": 0.25}}
    for changes in ({}, narrow):
        table7(tmp_path, **changes)
    for seed in (1, 2, 3):
        write_record(tmp_path, config("bn", budget="smoke"), seed)
        write_record(tmp_path, config("bkn", budget="smoke"), seed)
    found = judged(monkeypatch, tmp_path, claim(), claim(ours=True), claim(datasets=["imagenet"]))
    assert [(v.state, v.group.width, v.family) for v in found if v.group] == [
        ("supported", 1.0, 1),
        ("explored", 0.25, 1),
        ("explored", 1.0, 1),
        ("explored", 0.25, 1),
        ("explored", 1.0, 1),
        ("explored", 0.25, 1),
    ]


def test_budgets_and_data_sets_are_never_mixed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        write_record(tmp_path, config("bn"), seed, 60.0)
        write_record(tmp_path, config("bkn", budget="paper"), seed, 90.0)
        write_record(tmp_path, config("bkn", dataset="cifar100"), seed, 50.0)
    assert {v.state for v in judged(monkeypatch, tmp_path, claim())} == {"not run"}


@pytest.mark.parametrize("changes", [{"precision": "bf16"}, {"sha256": "e" * 64}])
def test_arithmetic_and_data_are_never_compared(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, changes: dict[str, Any]
) -> None:
    for seed in (1, 2, 3):
        write_record(tmp_path, config("bn"), seed, 60.0 + 0.1 * seed)
        write_record(tmp_path, config("bkn"), seed, 90.0, **changes)
    (found,) = judged(monkeypatch, tmp_path, claim())
    assert found.state == "open" and "other arithmetic, or on other data" in found.why and found.effect is None


# Runs that were lost


def test_lost_runs_count_against_the_side_that_lost_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table7(tmp_path)
    write_record(tmp_path, config("bkn"), 4, failed="x")
    ahead, behind = judged(monkeypatch, tmp_path, claim(), claim(expect="less"))
    assert ahead.state == "open" and "1 of 4 runs of + table7/kn_stat2 failed or stayed at chance" in ahead.why
    assert behind.state == "contradicted"  # the others are ahead; that one failed does not help the claim


def test_more_than_half_lost_contradicts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table7(tmp_path)
    for seed in (4, 5, 6, 7):
        write_record(tmp_path, config("bkn"), seed, 10.0, 10.0)
    ahead, equal = judged(monkeypatch, tmp_path, claim(), claim(expect="equal", margin=5))
    assert ahead.state == equal.state == "contradicted" and "4 of 7 runs" in ahead.why


def test_what_did_not_learn_shows_no_equality(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        write_record(tmp_path, config("bn"), seed, 10.0, 10.0)
        write_record(tmp_path, config("bkn"), seed, 10.0 + 0.1 * seed, 10.0)
    (found,) = judged(monkeypatch, tmp_path, claim(expect="equal", margin=5))
    assert found.state == "open" and found.effect is None and "3 of 3" in found.why


def test_stability_is_a_difference_of_shares(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for seed in range(1, 41):
        write_record(tmp_path, config("bn"), seed, 60.0)
        write_record(tmp_path, config("bkn"), seed, 60.0 if seed % 2 else 10.0, 10.0)
    (found,) = judged(monkeypatch, tmp_path, claim(expect="less", quantity="lost"))
    assert found.effect is not None and found.measured == pytest.approx(50)
    assert found.state == "contradicted" and "20 of 40 runs of one side" in found.why
    # Newcombe (1998), method 10: 32.6 to 65.1 by hand, from Wilson's 35.2 to 64.8 % and 0 to 8.76 %.
    assert (found.low, found.high) == (pytest.approx(32.8, abs=0.1), pytest.approx(64.8, abs=0.1))


def test_without_lost_runs_shares_have_no_interval(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table7(tmp_path)
    (found,) = judged(monkeypatch, tmp_path, claim(expect="less", quantity="lost"))
    assert found.state == "open" and found.estimate == "+0 points (n = 3)" and "0 of 3 runs" in found.why


def test_two_seeds_are_shown_without_an_interval(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table7(tmp_path, seeds=2)
    (found,) = judged(monkeypatch, tmp_path, claim())
    assert found.state == "open" and found.estimate == "+2.00 (+2.00, +2.00) points (n = 2)"


# Quantities


def test_online_minus_moving_is_of_the_same_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table7(tmp_path)
    of = claim(("+table7/kn_stat2 online",), "equal", quantity="shift", margin=0.3)
    other = claim(("-table7/bn_stat2 online",), "greater", quantity="shift")
    equal, gap = judged(monkeypatch, tmp_path, of, other)
    assert equal.effect is not None and equal.measured == pytest.approx(0)
    assert gap.measured == pytest.approx(1.2) and gap.state == "supported"


def test_steps_are_read_between_evaluations() -> None:
    run = {"step": [100, 200, 300], "curve": [20.0, 40.0, 60.0], "dataset.classes": 10}
    assert quantities.steps_to(run, 30) == 150 and quantities.steps_to(run, 60) == 300
    assert quantities.steps_to(run, 15) == 50  # from chance, 10 %
    assert quantities.steps_to(run, 61) == math.inf and quantities.steps_to({"step": None}, 1) is None


def test_fewer_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for seed in (1, 2, 3, 4):
        curves = {"epoch": [1, 2], "step": [100, 200], "online": [50.0, 50.0]}
        write_record(tmp_path, config("bn"), seed, curves={**curves, "moving": [30.0, 60.0 + 0.1 * seed]})
        write_record(tmp_path, config("bkn"), seed, curves={**curves, "moving": [60.2 + 0.1 * seed, 70.0]})
    fewer, never = judged(
        monkeypatch,
        tmp_path,
        claim(expect="less", quantity="steps_to"),
        claim(("+table7/bn_stat2", "-table7/kn_stat2"), "less", quantity="steps_to"),
    )
    assert fewer.state == "supported" and fewer.measured == pytest.approx(-50, abs=2)
    assert never.state == "contradicted" and "never got there" in never.why


def test_quantities_of_the_mechanism(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table7(tmp_path)
    pair = ("+figure5/kn_stat2", "-figure5/bn_stat2")
    found = judged(
        monkeypatch,
        tmp_path,
        claim(pair, "less", quantity="gap_used"),
        claim(("+figure5/bn_stat2",), "greater", quantity="depth_growth"),
        claim(("+layer-errors/kn_stat2",), "less", quantity="posterior_spread_mean"),
        claim(("+layer-errors/kn_stat2",), "greater", quantity="posterior_error_mean", than=20),
    )
    assert all(v.effect is not None for v in found)
    assert found[1].state == "supported" and found[1].measured == pytest.approx(math.log(0.55 / 0.15), abs=0.3)
    assert found[2].measured == pytest.approx(-50)  # 0.2 against 0.4


def test_parameters_are_counted_and_speed_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    counted, speed = (c for c in claims.claims() if c.id in ("parameters_v1", "table3_speed"))
    few = claim(("+table2/resnet50@gn", "-table2/resnet50@bn"), "less", quantity="parameters", than=1, margin_why="x")
    host = {
        "hardware": "box",
        "device": "cpu",
        "threads": 1,
        "started": "2026",
        "git": {"commit": "c"},
        "versions": {"torch": "2"},
    }
    batch = {"grad_batch": 4, "stat_batch": 2}
    part = {"arch": {"name": "inception_v2"}, "norm": {"name": "bn"}, "batch": batch, "size": 64, "precision": "fp32"}
    part["compile"] = False
    folder = tmp_path / "speed"
    folder.mkdir()
    measurement = {"id": "one", "experiment": "table3", "host": host, "configs": {"bn": part, "kn": part},
                   "seconds": {"bn": [1.0] * 8, "kn": [1.02] * 8}}  # fmt: skip
    (folder / "one.json").write_text(json.dumps(measurement))
    more, none, slower = judged(monkeypatch, tmp_path, counted, few, speed)
    assert more.state == "contradicted" and 30 < more.measured < 40  # preset v1's transitions
    assert none.state == "supported" and none.measured == 0
    assert slower.state == "supported" and slower.measured == pytest.approx(2)


def test_an_estimate_in_words() -> None:
    verdict = Verdict(claim(), "open", effect=Effect(-1.5, 0.5, 8, 3, 0.5, (1, -1), 4), low=-2.5, high=-0.5)
    assert verdict.estimate == "−1.50 [−2.50, −0.50] points (n = 3)"


@pytest.mark.parametrize("high, outside", [(0.43, True), (1.6, False)])
def test_the_answer_says_when_the_papers_value_is_outside_the_interval(
    tmp_path: Path, high: float, outside: bool
) -> None:
    known = claim(answer="Is it?", network="ResNet-32", paper={"cifar10": 1.5})
    effect, group = Effect(-0.38, 0.2, 8, 3, 0.5, (1, -1), 4), Group("cifar10", "paper")
    (said, _) = page.answer(
        [Verdict(known, "open", group=group, effect=effect, low=-1.19, high=high)], Cells(report.load(tmp_path))
    )
    assert said.startswith("Is it? Not decided on ResNet-32, −0.38")
    assert said.endswith("the paper has +1.5, outside the interval." if outside else "the paper has +1.5.")


def test_answers_speak_of_the_claims_own_data_where_these_ran() -> None:
    known = claim(answer="Is it?", network="ResNet-14", ours=True, datasets=("cifar10",))
    effect = Effect(4.5, 0.2, 8, 3, 0.5, (1, -1), 4)
    own, others = (
        Verdict(known, "explored", group=Group(dataset, "lite"), effect=effect, low=4, high=5)
        for dataset in ("cifar10", "digits")
    )
    assert page.answers([others, own]) == {"Is it?": [own]}
    assert page.answers([others]) == {"Is it?": [others]}
