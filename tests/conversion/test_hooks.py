"""Hooks on a converted model: they see what a module returns, without beliefs; a belief ends where one changes it."""

import copy
from typing import Any

import pytest
import torch
from helpers import net
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from kalmannorm import belief_report, convert, fold


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def test_hooks_see_what_a_module_returns() -> None:
    model, seen = convert(net(), "bkn", stat_batch=2), []
    for layer in model:
        layer.register_forward_hook(lambda _, args, out: seen.append((type(args[0]), type(out))))
    model(torch.randn(4, 3, 8, 8))
    assert seen == [(Tensor, Tensor)] * len(model)


class Remembering(nn.Module):
    """Its hooks close over what they fill: the model, and a list that it keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.last, self.all = net(), torch.zeros(()), list[torch.Tensor]()
        all_of_them = self.all

        def remember(layer: nn.Module, args: Any, y: torch.Tensor) -> None:
            self.last = y

        self.part[1].register_forward_hook(remember)
        self.part[3].register_forward_hook(lambda layer, args, y: all_of_them.append(y))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.all.clear()
        y: torch.Tensor = self.part(x)
        return y + self.last.mean() + self.all[0].mean()


@pytest.mark.parametrize("norm", ["bn", "bkn"])
def test_hooks_of_a_copy_fill_what_is_its_own(norm: str) -> None:
    model, first, x = Remembering().eval(), torch.randn(2, 3, 8, 8), torch.randn(4, 3, 8, 8)
    model(first)  # what is left of it is copied, and was what every forward of the copy found
    converted = convert(model, norm, stat_batch=2)
    folded = fold(converted)
    expected = model(x)
    model(first)
    torch.testing.assert_close(converted(x), expected)
    torch.testing.assert_close(folded(x), expected)


def test_hooks_of_all_modules_see_what_they_return() -> None:
    seen: list[Any] = []
    model = convert(net(), "bkn", stat_batch=2)
    handle = nn.modules.module.register_module_forward_hook(lambda *given: seen.append(given[2]))
    try:
        model(torch.randn(4, 3, 8, 8))
    finally:
        handle.remove()
    assert len(seen) == len(list(model.modules())) and all(isinstance(y, Tensor) for y in seen)


@pytest.mark.parametrize("place", ["2", "3"])
@pytest.mark.parametrize("how", ["replaces", "in place", "before", "looks"])
def test_a_belief_ends_where_a_hook_changes_a_value(how: str, place: str) -> None:
    model = convert(net(), "bkn", stat_batch=2)
    layer = model.get_submodule(place)
    hooks: dict[str, Any] = {
        "replaces": lambda _, args, y: 10 * y,
        "in place": lambda _, args, y: (y.mul_(10), None)[1],
    }
    if how == "before":
        layer.register_forward_pre_hook(lambda _, args: (10 * args[0],))
    else:
        layer.register_forward_hook(hooks.get(how, lambda _, args, y: None))
    why = belief_report(model, torch.randn(4, 3, 8, 8))["4"]
    assert why is None if how == "looks" else str(why).startswith(f"{place} ({type(layer).__name__}: a hook or a ")


@pytest.mark.parametrize("ahead", [True, False])
def test_backward_hooks_see_gradients_of_what_a_module_returns(ahead: bool) -> None:
    """And may replace them; also of layers that convert replaces. fold gives them back as they were registered."""
    seen: list[Any] = []

    def before(_: nn.Module, of_outputs: Any) -> Any:
        seen.append(of_outputs)
        return (of_outputs[0].clone(),)

    def after(_: nn.Module, of_inputs: Any, of_outputs: Any) -> Any:
        seen.append(of_outputs)
        return (of_inputs[0].clone(),)

    original, x = net(), torch.randn(4, 3, 8, 8)
    plain = convert(original, "bkn", stat_batch=2)
    hooked = original if ahead else copy.deepcopy(plain)
    for layer in (hooked[3], hooked[4]):
        layer.register_full_backward_pre_hook(before)
        layer.register_full_backward_hook(after)
    model = convert(original, "bkn", stat_batch=2) if ahead else hooked
    for one in (model, plain):
        one(x).square().sum().backward()
    assert [len(grads) for grads in seen] == [1] * 4
    torch.testing.assert_close(model[0].weight.grad, plain[0].weight.grad)
    assert all(list(layer._backward_hooks.values()) == [after] for layer in fold(model)[3:5])


def test_backward_hooks_of_all_modules_see_gradients_of_what_they_return() -> None:
    seen: list[tuple[int, int]] = []
    handle = module_hooks.register_module_full_backward_hook(
        lambda _, of_inputs, of_outputs: seen.append((len(of_inputs), len(of_outputs)))
    )
    try:
        convert(net(), "bkn", stat_batch=2)(torch.randn(4, 3, 8, 8)).sum().backward()
    finally:
        handle.remove()
    assert len(seen) == 10 and set(seen) == {(1, 1)}
