"""What a run takes from its data before the first step: the input's belief; and what depends on its progress."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import error

from kalmannorm import data
from kalmannorm.cli import main
from kalmannorm.conversion import INPUT_BELIEF
from kalmannorm.errors import UserError
from kalmannorm.experiments.config import compose
from kalmannorm.norm import BatchRenorm
from kalmannorm.train import loop
from kalmannorm.train.from_data import initialize, measure_input
from kalmannorm.train.loaders import loaders
from kalmannorm.train.model import build
from kalmannorm.train.ranks import Ranks

SMALL = ["dataset=digits", "budget=smoke", "arch.width=0.125", "device=cpu", "batch.grad_batch=32"]
WITH_INPUT = [*SMALL, "norm=bkn", "norm.preset=v1", "+norm.options.input_belief=data"]


def place(folder: Path) -> list[str]:
    return [f"results={folder}", f"runs={folder / 'runs'}"]


def test_input_belief_is_that_of_the_preprocessed_training_set() -> None:
    config = compose(WITH_INPUT)
    arrays = data.load("digits", data.root())
    ranks = Ranks(config)
    model, _ = build(config)
    loader, _ = loaders(config, arrays, ranks)
    measure_input(model, (x[:counted] for x, _, counted in loader.unaugmented(50)), ranks)
    chosen = data.class_balanced_subset(arrays.train_labels, config.budget.subset)
    images = data.resize(arrays.train_images[chosen], config.budget.size).astype(np.float64)
    images = (images - images.mean(0)) / 128
    for name, expected in zip(INPUT_BELIEF, (images.mean((0, 1, 2)), images.var((0, 1, 2))), strict=True):
        found = model.get_buffer(name)
        assert found.shape == (1, 3) and (found[0] - torch.from_numpy(expected)).abs().max() < 1e-6
    assert float(model.get_buffer(INPUT_BELIEF[1]).min()) > 0.01  # not a constant
    assert not set(INPUT_BELIEF) & set(model.state_dict())


@pytest.mark.usefixtures("small")
def test_a_run_with_an_input_belief_is_evaluated_and_exported(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """evaluate measures it again; the one R of v1, the same tensor under many names, can be exported."""
    assert main(["train", *WITH_INPUT, *place(tmp_path)]) == 0
    (file,) = (tmp_path / "records").glob("*.json")
    record = json.loads(file.read_text())
    assert all(lost is None for lost in record["norms"]["beliefs"].values())
    assert record["config"]["norm"]["options"]["noise"] == "shared"
    capsys.readouterr()
    assert main(["evaluate", record["id"], *place(tmp_path)]) == 0
    for line in capsys.readouterr().out.splitlines()[1:]:
        kind = line.split()[0]
        assert line.count(f"{record['final'][kind]['accuracy']:.2f} %") == 2, line
    assert main(["export", record["id"], str(tmp_path / "weights.safetensors"), *place(tmp_path)]) == 0


def test_weight_norm_starts_from_the_first_batch_of_the_run() -> None:
    config = compose([*SMALL, "norm=wn"])
    arrays = data.load("digits", data.root())
    loader, _ = loaders(config, arrays, Ranks(config))
    model, _ = build(config)
    initialize(model, loader)
    x, _ = next(loader.epoch(0))
    out = model.get_submodule("stem.conv")(x)
    var, mean = torch.var_mean(out, (0, 2, 3), correction=0)
    assert mean.abs().max() < 1e-4 and error(var.detach(), torch.ones_like(var)) < 1e-3


@pytest.mark.usefixtures("small")
def test_brn_s_schedule_follows_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before every step its share of the run's steps; before an evaluation that of the epochs done."""
    seen: list[float] = []
    set_progress = BatchRenorm.set_progress

    def noted(layer: BatchRenorm, fraction: float) -> None:
        seen.append(fraction)
        set_progress(layer, fraction)

    overrides = [*SMALL, "norm=brn", "budget.epochs=2", "budget.subset=96", *place(tmp_path)]
    config = compose(overrides)
    monkeypatch.setattr(BatchRenorm, "set_progress", noted)
    loop.run(config)
    layers = sum(isinstance(m, BatchRenorm) for m in build(config)[0].modules())
    of_first = seen[layers : 9 * layers : layers]  # the first time is each layer's construction
    assert of_first == pytest.approx([0, 1 / 6, 2 / 6, 1 / 2, 3 / 6, 4 / 6, 5 / 6, 1])


def test_what_belongs_to_kalman_normalizers_is_refused_elsewhere() -> None:
    for extra in (["norm.preset=talk"], ["norm.predictor=sampling"], ["+norm.options.input_belief=data"]):
        with pytest.raises(UserError, match=r"norm bn on inception_cifar: .* is an option of bkn and gkn"):
            build(compose([*SMALL, "norm=bn", *extra]))
