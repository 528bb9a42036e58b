"""What a checkpoint brings back."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from kalmannorm.errors import UserError
from kalmannorm.experiments.config import compose
from kalmannorm.train import checkpoint
from kalmannorm.train.ranks import Ranks
from kalmannorm.train.state import Session


def draw() -> list[float]:
    """From every generator that a model or data set of one's own may use."""
    return [torch.rand(1).item(), random.random(), np.random.rand()]  # noqa: NPY002


def session(folder: Path, model: nn.Module) -> Session:
    sgd = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    return Session("run", folder, model, sgd, Ranks(compose(["device=cpu"])), dict, {"epoch": []})


def test_random_generators_go_on_where_they_were(tmp_path: Path) -> None:
    """A run that goes on after a kill draws what it would have drawn."""
    model = nn.Linear(2, 2)
    one = session(tmp_path, model)
    draw()
    one.save()
    expected = draw()
    draw()
    one.restore()
    assert draw() == expected


def trained(folder: Path, model: nn.Module) -> Session:
    """After one step, so that the optimizer has momentum."""
    one = session(folder, model)
    model(torch.ones(1, 2)).sum().backward()
    one.optimizer.step()
    one.step = 1
    return one


OTHERS = {
    "of other shapes": lambda: nn.Linear(2, 5),
    "of other names": lambda: nn.Sequential(nn.Linear(2, 3)),
    "of another type": lambda: nn.Linear(2, 3).double().requires_grad_(False),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_checkpoint_of_another_network_stands_back_behind_a_good_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    good = trained(tmp_path, nn.Linear(2, 3))
    good.save()
    other = session(tmp_path, OTHERS[kind]())
    other.step = 7
    other.save()
    back = session(tmp_path, nn.Linear(2, 3))
    back.restore()
    assert back.step == 1 and torch.equal(back.model.weight, good.model.weight)  # type: ignore[arg-type]
    assert "of another network" in (said := capsys.readouterr().err) and said.count("\n") == 1
    (tmp_path / checkpoint.PREVIOUS).unlink()
    fresh = session(tmp_path, nn.Linear(2, 3))
    before = fresh.model.weight.clone()  # type: ignore[operator]
    with pytest.raises(UserError, match="of another network"):
        fresh.restore()
    assert torch.equal(fresh.model.weight, before)  # type: ignore[arg-type]


def test_momentum_of_another_shape_is_not_taken(tmp_path: Path) -> None:
    one = trained(tmp_path, nn.Linear(2, 3))
    one.optimizer.state[one.model.weight]["momentum_buffer"] = torch.zeros(3, 1)  # type: ignore[index]
    one.save()
    with pytest.raises(UserError, match=r"of another optimizer: momentum 0 is \[3, 1\]"):
        session(tmp_path, nn.Linear(2, 3)).restore()


def test_files_of_killed_saves_are_cleared(tmp_path: Path) -> None:
    left = tmp_path / f".{checkpoint.NAME}.abc"
    left.write_bytes(b"half")
    trained(tmp_path, nn.Linear(2, 3)).save()
    assert not left.exists() and (tmp_path / checkpoint.NAME).exists()
