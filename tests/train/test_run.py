"""Real trainings, small: records, resume, determinism, failures, evaluation, and the command line around them."""

import json
import math
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import faulty
import numpy as np
import pytest
import torch
from trainings import SMALL, assert_same_run, only_record, place

from kalmannorm import data
from kalmannorm.cli import main
from kalmannorm.experiments import record as records
from kalmannorm.experiments.cards import load
from kalmannorm.experiments.config import compose
from kalmannorm.models import ARCHS, LAST_NORMALIZERS, ResNet
from kalmannorm.runs import job, worker
from kalmannorm.train import checkpoint, loop, task_classification
from kalmannorm.train.evaluate import evaluate
from kalmannorm.train.loaders import loaders
from kalmannorm.train.model import build, learning_rate, optimizer
from kalmannorm.train.ranks import Ranks


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished run of two epochs, with its folder and overrides."""
    folder = tmp_path_factory.mktemp("done")
    overrides = [*SMALL, *place(folder), "budget.epochs=2"]
    assert main(["train", *overrides]) == 0
    return folder, overrides, only_record(folder)


# --- the record ---


def test_record_is_whole(done):
    _, overrides, record = done
    config = compose(overrides)
    assert record["id"] == records.run_id(config) and record["status"] == "done"
    assert record["config"] == json.loads(json.dumps(config.result()))
    assert len(record["curves"]["moving"]) == 2 and record["curves"]["step"] == [2, 4]
    for kind in ("moving", "online", "precise"):
        assert record["final"][kind]["images"] == 360
        assert 0 <= record["final"][kind]["accuracy"] <= 100
    assert record["curves"]["moving"][-1] == record["final"]["moving"]["accuracy"]
    assert record["data"]["name"] == "digits" and len(record["data"]["sha256"]) == 64
    assert record["host"]["images_per_s"] > 0 and record["host"]["git"].keys() == {"commit", "dirty"}
    assert record["norms"]["beliefs"]["stem.bn"] and record["norms"]["beliefs"]["blocks.2.b3.1.bn"] is None
    assert set(record["norms"]["gains"]) == set(record["norms"]["order"])
    model, _ = build(config)
    assert record["parameters"] == sum(p.numel() for p in model.parameters())


def test_arrays_for_the_figure_stand_beside_the_record(done):
    folder, _, record = done
    with np.load(folder / "results" / "records" / f"{record['id']}.npz") as arrays:
        channels = sum(arrays["last_channels"])
        assert arrays["gap_used"].shape == arrays["gap_measured"].shape == (channels, 64)
        assert arrays["moving_var"].shape == (channels,)
        assert len(arrays["layer_gap_used"]) == len(record["norms"]["order"])
        assert np.isfinite(arrays["gap_used"]).all() and (arrays["gap_used"] > 0).any()
        whole, bias, spread = (arrays[f"layer_error_var{part}"] for part in ("", "_bias", "_spread"))
        assert whole.shape == bias.shape == spread.shape == (3, len(record["norms"]["order"]))
        assert np.isnan(whole[1, 0]) and np.isfinite(whole[:, 1:]).all()  # the first normalizer has no prior
        assert (spread[2, 1:] < spread[0, 1:]).mean() > 0.8  # what normalizes is less noisy than what is measured
    raw = np.load(folder / "runs" / record["id"] / "gaps.npz")
    assert raw["used"].shape == (128, channels)  # 256 images in groups of 2


def test_gaps_are_what_they_say(done):
    """Bin means recomputed from the raw gaps, which half precision rounds."""
    folder, _, record = done
    small = np.load(folder / "results" / "records" / f"{record['id']}.npz")
    raw = np.load(folder / "runs" / record["id"] / "gaps.npz")
    by_hand = raw["measured"].astype(np.float64).reshape(64, 2, -1).mean(1).T
    np.testing.assert_allclose(small["gap_measured"], by_hand, rtol=2e-3, atol=1e-4)


def test_a_finished_run_is_not_run_again_and_needs_no_torch(done):
    folder, overrides, record = done
    code = (
        "import sys; from kalmannorm.cli import main\n"
        f"assert main(['train', *{overrides!r}]) == 0 and 'torch' not in sys.modules"
    )
    began = time.perf_counter()
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert "done already" in printed and time.perf_counter() - began < 10
    assert only_record(folder) == record


def test_evaluate_finds_the_recorded_numbers(done, capsys):
    folder, _, record = done
    assert main(["evaluate", record["id"][:6], *place(folder)]) == 0
    printed = capsys.readouterr().out
    for kind in ("moving", "online", "precise"):
        line = next(line for line in printed.splitlines() if line.strip().startswith(kind))
        accuracy = f"{record['final'][kind]['accuracy']:.2f} %"
        assert line.count(accuracy) == 2, line


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["zzzz"], "no run"),
        ([""], "exactly one"),
        (["ID", "seed=3"], "settings are in its record"),
        (["ID", "runs=/nowhere"], "no weights"),
    ],
)
def test_evaluate_refuses(done, capsys, arguments, word):
    folder, _, record = done
    (folder / "results" / "records" / "000000000000.json").write_text("{}")
    arguments = [a.replace("ID", record["id"]) for a in arguments]
    where = [path for path in place(folder) if not path.startswith("runs=") or "runs=/nowhere" not in arguments]
    code = main(["evaluate", arguments[0], *where, *arguments[1:]])
    (folder / "results" / "records" / "000000000000.json").unlink()
    assert code == 2 and word in capsys.readouterr().err


def test_export_holds_weights_and_configuration(done, capsys):
    from safetensors import safe_open

    folder, _, record = done
    file = folder / "weights.safetensors"
    assert main(["export", record["id"], str(file), *place(folder)]) == 0
    state = checkpoint.load(folder / "runs" / record["id"], record["id"])
    with safe_open(file, "pt") as exported:
        assert json.loads(exported.metadata()["config"]) == record["config"]
        assert json.loads(exported.metadata()["id"]) == record["id"]
        assert set(exported.keys()) == set(state["model"])
        assert all(torch.equal(exported.get_tensor(key), value) for key, value in state["model"].items())
    assert main(["export", record["id"], str(folder), *place(folder)]) == 2
    assert "cannot write" in capsys.readouterr().err


# --- the same numbers again ---


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("norm", ["gn", "gkn"])
def test_two_runs_are_equal_but_for_host(tmp_path, norm):
    """Others' are in the test that follows, which cuts one of the two."""
    for name in "ab":
        assert main(["train", *SMALL, f"norm={norm}", *place(tmp_path / name)]) == 0
    assert_same_run(tmp_path / "a", tmp_path / "b")


# --- training ---


def test_released_learning_rates_at_the_paper_s_budget():
    config = compose(["dataset=cifar10", "budget=paper"])
    steps = 390
    rates = {epoch: learning_rate((epoch - 1) * steps, 400 * steps, config.schedule, None) for epoch in range(1, 401)}
    expected = {1: 0.01, 2: 0.1, 82: 0.1, 83: 0.01, 123: 0.01, 124: 0.001, 300: 0.001, 301: 0.0002, 400: 0.0002}
    assert {epoch: rates[epoch] for epoch in expected} == expected
    assert learning_rate(steps - 1, 400 * steps, config.schedule, None) == 0.01


def test_scaled_milestones():
    schedule = compose([]).schedule
    rates = [learning_rate(step, 200, schedule, None) for step in range(200)]
    expected = {0.01: 1 + 21, 0.1: 40, 0.001: 88, 0.0002: 50}
    assert {rate: rates.count(rate) for rate in expected} == expected


def test_weight_decay_is_by_module_type():
    model, _ = build(compose([*SMALL, "norm=bkn"]))
    decayed, rest = optimizer(model, momentum=0.9, weight_decay=2e-4).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert decayed["weight_decay"] == 2e-4 and rest["weight_decay"] == 0
    decayed_names = {names[id(p)] for p in decayed["params"]}
    assert decayed_names == {n for n in names.values() if n.endswith(".conv.weight") or n == "fc.weight"}
    assert {n for n in names.values() if "gain" in n or "noise" in n} <= {names[id(p)] for p in rest["params"]}


@pytest.mark.usefixtures("small")
def test_one_optimizer_step_a_batch(tmp_path, monkeypatch):
    steps = []
    original = torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self, *a: (steps.append(1), original(self, *a))[1])
    assert main(["train", *SMALL, "budget.epochs=2", *place(tmp_path)]) == 0
    assert len(steps) == 2 * (256 // 128)


def test_seeds_share_nothing_and_normalizers_share_initial_weights():
    weights = {}
    for norm in ("bn", "bkn"):
        for seed in (1, 2):
            model, _ = build(compose([*SMALL, f"norm={norm}", f"seed={seed}"]))
            weights[norm, seed] = model.stem.conv.weight.detach()
    assert torch.equal(weights["bn", 1], weights["bkn", 1])
    assert not torch.equal(weights["bn", 1], weights["bn", 2])


@pytest.mark.usefixtures("small")
def test_a_loss_that_is_not_finite_ends_the_run_with_a_record_that_says_so(tmp_path, capsys):
    overrides = [*SMALL, "schedule.lr=[[400,1.0e+30]]", "budget.epochs=3", *place(tmp_path)]
    assert main(["train", *overrides]) == 1
    record = only_record(tmp_path)
    assert record["status"] == "failed" and "not finite" in record["reason"] and "epoch" in record["reason"]
    assert "final" not in record and "not finite" in capsys.readouterr().err


@pytest.mark.usefixtures("small")
def test_bf16_is_an_option(tmp_path):
    assert main(["train", *SMALL[:-1], "precision=bf16", *place(tmp_path)]) == 0
    assert only_record(tmp_path)["config"]["precision"] == "bf16"


@pytest.fixture
def shallow(monkeypatch) -> list[str]:
    """SMALL with half as many blocks as the smallest ResNet: a compiler's time grows with them."""
    monkeypatch.setitem(ARCHS, "resnet14", partial(ResNet, 1))
    monkeypatch.setitem(LAST_NORMALIZERS, "resnet14", ("blocks.2.bn2",))
    return [*(one for one in SMALL if not one.startswith("arch.")), "arch=resnet14"]


@pytest.mark.slow
def test_a_compiled_run_learns_like_an_eager_one(tmp_path, shallow):
    for flag in ("true", "false"):
        assert main(["train", *shallow, f"compile={flag}", *place(tmp_path / flag)]) == 0
    a, b = (only_record(tmp_path / flag)["curves"]["train_loss"][0] for flag in ("true", "false"))
    assert math.isclose(a, b, rel_tol=1e-3)


@pytest.mark.slow
def test_every_run_of_a_process_is_compiled(tmp_path, monkeypatch, shallow):
    """A sweep's worker trains one after the other; the compiler counts the models of a process, and then gives up."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        for batch in (128, 64):
            overrides = [*shallow, "norm=bkn", "compile=true", f"batch.grad_batch={batch}", "budget.subset=128"]
            assert main(["train", *overrides, *place(tmp_path / str(batch))]) == 0


# --- evaluation ---


def test_every_image_is_counted_once_and_the_order_of_the_test_set_does_not_matter_to_moving(monkeypatch):
    config = compose([*SMALL, "norm=bn", "batch.stat_batch=128"])
    model, _ = build(config)
    arrays = data.load("digits", Path("data"))
    _, test = loaders(config, arrays, Ranks(config))
    found = {kind: evaluate(model, test, kind, 128) for kind in ("moving", "online")}
    assert [values["images"] for values in found.values()] == [360, 360]  # 360 is no multiple of 128
    monkeypatch.setattr(test, "fixed_order", lambda: torch.arange(360))
    for kind, values in found.items():
        other = evaluate(model, test, kind, 128)["loss"]
        assert math.isclose(other, values["loss"], rel_tol=1e-5) is (kind == "moving")


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("norm", "kinds"), [("bkn", ["moving", "online"]), ("gn", ["moving"])])
def test_what_is_known_is_not_evaluated_again(tmp_path, monkeypatch, norm, kinds):
    """Without batch statistics both kinds are one evaluation; the last epoch's is the run's."""
    made = []

    def kept(model, test, statistics, *args):
        found = evaluate(model, test, statistics, *args)
        made.append((statistics, found))
        return found

    def interrupted(*args):
        raise RuntimeError("after the training")

    monkeypatch.setattr(task_classification, "evaluate", kept)
    config = compose([*SMALL, *place(tmp_path), f"norm={norm}", "budget.epochs=1"])
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="after the training"):
        patch.setattr(task_classification, "precise", interrupted)
        loop.run(config)
    assert [kind for kind, _ in made] == kinds
    record = loop.run(config)  # goes on behind the last epoch, whose evaluation's losses are lost
    assert [kind for kind, _ in made] == [*kinds, *kinds, "moving"]  # the last by precise statistics
    assert made[: len(kinds)] == made[len(kinds) : -1]
    assert record["final"]["moving"] == made[0][1] and record["final"]["online"] == made[len(kinds) - 1][1]
    for kind in ("moving", "online"):
        assert record["curves"][kind] == [record["final"][kind]["accuracy"]]


# --- sweeps ---


@pytest.mark.slow
def test_a_sweep_goes_on_past_a_failure_skips_what_is_done_and_says_so(tmp_path, capsys, monkeypatch):
    """Trained for real, in worker processes; more of sweeps, with trainings stood in for, in test_sweep.py."""
    overrides = ["table7", *SMALL, "rows=paper", "seeds=1", *place(tmp_path)]
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({records.run_id(compose([*SMALL, "norm=bkn"])): ["raise"]}))
    monkeypatch.setenv("FAULTY_REAL", "1")
    monkeypatch.setattr(worker, "COMMAND", faulty.worker_command(plan))
    assert main(["sweep", *overrides, "retries=0", "slots=1"]) == 1
    error = capsys.readouterr().err
    assert "1 of 3 runs failed" in error and "RuntimeError: injected" in error
    statuses = [json.loads(f.read_text())["status"] for f in (tmp_path / "results" / "records").glob("*.json")]
    assert sorted(statuses) == ["done", "done", "failed"]
    assert main(["sweep", *overrides]) == 0  # the failed one is run again, the others are not
    assert "1 of 3 runs to do" in capsys.readouterr().err


@pytest.mark.usefixtures("small")
def test_a_sweep_that_is_done_is_reported(tmp_path, capsys):
    """Its runs trained as its workers train them, in this process."""
    overrides = ["table7", *SMALL, "rows=paper", "seeds=1", *place(tmp_path)]
    assert main(["sweep", *overrides, "--dry-run"]) == 0
    assert "3 of 3 runs to do" in capsys.readouterr().err and not (tmp_path / "results").exists()
    for config in load("table7", overrides[1:]).runs:
        assert job.perform(config) == job.Outcome("done")
    assert main(["sweep", *overrides]) == 0
    assert "0 of 3 runs to do" in capsys.readouterr().err
    assert main(["report", *overrides]) == 0
    printed = capsys.readouterr().out
    assert "table7-precision-fp32_digits-smoke-w0.125.md" in printed and "BN" in printed
    table = (tmp_path / "results" / "table7-precision-fp32_digits-smoke-w0.125.md").read_text()
    # Two steps teach a network nothing, and no number of such a one is shown as a result.
    assert table.count("0 of 1 learned") == 3 * 2
    # Nor a picture of what it does.
    elsewhere = [*overrides[1:3], "arch.width=0.125", "device=cpu", "seeds=1", *place(tmp_path)]
    assert main(["report", "figure5", *elsewhere]) == 2 and "whose network learned" in capsys.readouterr().err
