"""Converted models in activation checkpoints, where a forward runs twice."""

import copy
import functools
from typing import Any

import pytest
import torch
from helpers import net
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from kalmannorm import NORMS, belief_report, convert
from kalmannorm.norm.modes import finish_gradients


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def gradients(model: nn.Module, x: Tensor, how: bool | None) -> tuple[list[Tensor], list[Tensor]]:
    model = copy.deepcopy(model).train()
    for warm in range(3):  # moving averages that are not the first batch's
        model(x * (warm + 1))
    given = x.clone().requires_grad_()
    y = model(given) if how is None else checkpoint(model, given, use_reentrant=how)
    y.square().sum().backward()
    return [p.grad for p in model.parameters() if p.grad is not None], list(model.buffers())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    ("norm", "options"),
    [
        ("bkn", {}),
        ("bkn", {"predictor": "sampling"}),
        ("bkn", {"preset": "released"}),
        ("brn", {}),
        ("sn", {}),
        ("gkn", {}),
    ],
    ids=str,
)
def test_a_checkpoint_has_the_gradients_of_what_runs_once(norm: str, options: dict[str, Any], reentrant: bool) -> None:
    """Moving averages take one step, not two as torch's."""
    model, x = convert(net(), norm, stat_batch=2, **options), torch.randn(8, 3, 8, 8)
    once, again = gradients(model, x, None), gradients(model, x, reentrant)
    for first, second in zip(once, again, strict=True):
        for a, b in zip(first, second, strict=True):
            torch.testing.assert_close(a, b)


CHANGING: list[tuple[str, dict[str, Any]]] = [
    ("bkn", {"predictor": "sampling"}),
    ("bkn", {"predictor": "sampling", "belief": "output", "input_belief": "data"}),
    ("bkn", {"input_belief": "data"}),
    ("brn", {}),
    ("pn", {"estimator": "memory"}),
]


class Checkpointed(nn.Module):
    """The first convolution is behind a checkpoint of its own, and the layers after it run twice in one checkpoint."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.stem, self.body = how, net()[:3], net()[3:6]

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.stem, x, use_reentrant=False) if self.how == "nested" else self.stem(x)
        return self.body(self.body(x))


def of_several(model: nn.Module, batches: list[Tensor], run: Any, apart: bool) -> list[Tensor]:
    """Gradients where every forward runs before the first backward, in this order or that."""
    model = copy.deepcopy(model).train()
    for warm in range(3):
        model(batches[0] * (warm + 1))
    batches = [x.clone().requires_grad_() for x in batches]
    losses = [run(model, x).square().sum() for x in batches]
    for loss in losses if apart else [sum(losses)]:
        loss.backward()
    return [*(p.grad for p in model.parameters() if p.grad is not None), *(x.grad for x in batches), *model.buffers()]


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("how", ["reentrant", "not", "nested"])
@pytest.mark.parametrize(("norm", "options"), CHANGING, ids=str)
def test_several_checkpoints_wait_for_one_backward(norm: str, options: dict[str, Any], how: str, apart: bool) -> None:
    """The same batch twice among them: what each drew cannot be told from what it was given."""
    networks, x = (Checkpointed(how), Checkpointed("plain")), torch.randn(4, 3, 8, 8).double()
    model, plain = (convert(one.double(), norm, stat_batch=2, **options) for one in networks)
    plain.load_state_dict(model.state_dict())
    batches = [x, 2 * x + 1, x]
    expected = of_several(plain, batches, lambda net, x: net(x), apart)
    found = of_several(model, batches, lambda net, x: checkpoint(net, x, use_reentrant=how == "reentrant"), apart)
    assert len(expected) == len(found) > 10
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("options", [{}, {"predictor": "sampling"}, {"transition": "learned"}], ids=str)
def test_checkpoints_of_a_sequential_in_segments(options: dict[str, Any], reentrant: bool) -> None:
    class Net(nn.Module):
        def __init__(self, segments: int) -> None:
            super().__init__()
            self.segments, self.features = segments, net()

        def forward(self, x: Tensor) -> Tensor:
            if self.segments:
                return checkpoint_sequential(self.features, self.segments, x, use_reentrant=reentrant)
            return self.features(x)

    model, plain = (convert(Net(segments), "bkn", stat_batch=2, **options) for segments in (2, 0))
    plain.load_state_dict(model.state_dict())
    x = torch.randn(4, 3, 8, 8)
    assert belief_report(model, x) == belief_report(plain, x)
    assert None in belief_report(model, x).values()
    for a, b in zip(gradients(model, x, None), gradients(plain, x, None), strict=True):
        torch.testing.assert_close(a, b)


class Looping(nn.Module):
    """As timm has it: a function of several modules, which are called in turn."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.stem, self.features = how, nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)), net()

    def run(self, x: Tensor) -> Tensor:
        for layer in self.features:
            x = layer(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.how == "plain":
            return self.run(x) if x.sum() < 1e9 else x  # so that it runs as it is, as the others do
        if self.how == "list":
            return checkpoint_sequential(list(self.features), 2, x, use_reentrant=False)
        if self.how == "module":
            return torch.utils.checkpoint.checkpoint(lambda x: self.features(x), x, use_reentrant=False)
        return checkpoint(self.run, x, use_reentrant=self.how == "reentrant")


@pytest.mark.parametrize("how", ["reentrant", "not", "list", "module"])
@pytest.mark.parametrize("options", [{}, {"predictor": "sampling"}], ids=str)
def test_a_loop_in_a_checkpoint_hands_beliefs_on(options: dict[str, Any], how: str) -> None:
    model, plain = (convert(Looping(kind), "bkn", stat_batch=2, **options) for kind in (how, "plain"))
    plain.load_state_dict(model.state_dict())
    x = torch.randn(4, 3, 8, 8)
    first, *rest = belief_report(model, x).values()
    assert str(first).startswith("nothing: ") and set(rest) == {None}
    for a, b in zip(gradients(model, x, None), gradients(plain, x, None), strict=True):
        torch.testing.assert_close(a, b)


def test_a_checkpoint_that_is_not_known_by_name_is_reported() -> None:
    class Net(Looping):
        def __init__(self) -> None:
            super().__init__("")
            self.held = functools.partial(checkpoint, use_reentrant=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.held(self.run, self.stem(x))

    first, *rest = belief_report(convert(Net(), "bkn", stat_batch=2), torch.randn(4, 3, 8, 8)).values()
    assert str(first).startswith("nothing: ") and {str(why).partition(":")[0] for why in rest} == {
        "a checkpoint of several modules that are called in turn"
    }


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"predictor": "sampling"}, {"transition": "learned"}, {"input_belief": "data"}], ids=str
)
def test_segments_of_a_model_from_outside_are_the_model(options: dict[str, Any], reentrant: bool) -> None:
    """Though checkpoint_sequential calls its children one by one."""
    model, x = convert(net(), "bkn", stat_batch=2, **options), torch.randn(4, 3, 8, 8)
    found = []
    for segments in (0, 1, 3):
        twin, given = copy.deepcopy(model), x.clone().requires_grad_()
        y = checkpoint_sequential(twin, segments, given, use_reentrant=reentrant) if segments else twin(given)
        y.square().sum().backward()
        found.append([y, given.grad, *(p.grad for p in twin.parameters() if p.grad is not None), *twin.buffers()])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(b, a)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_of_parts_outside_of_the_forward_warns(reentrant: bool) -> None:
    """It calls them without beliefs."""
    model = convert(Looping("plain"), "bkn", stat_batch=2)
    x = torch.randn(4, 3, 8, 8).requires_grad_()
    with pytest.warns(UserWarning, match="without beliefs, by code that convert has not seen"):
        checkpoint(model.features, x, use_reentrant=reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("options", [{}, {"predictor": "sampling"}], ids=str)
def test_wrappers_of_activation_checkpoints(options: dict[str, Any], reentrant: bool) -> None:
    """Made after the conversion, as apply_activation_checkpointing does."""
    plain = convert(nn.Sequential(net()[:3], net()[3:]), "bkn", stat_batch=2, **options)
    model, x = copy.deepcopy(plain), torch.randn(4, 3, 8, 8)
    impl = CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT
    model[1] = checkpoint_wrapper(model[1], checkpoint_impl=impl)
    assert set(list(belief_report(model, x).values())[1:]) == {None}
    for a, b in zip(gradients(model, x, None), gradients(plain, x, None), strict=True):
        torch.testing.assert_close(a, b)


class OtherCheckpoint(torch.autograd.Function):
    """One that is not torch's."""

    @staticmethod
    def forward(ctx: Any, model: nn.Module, x: Tensor) -> Tensor:
        ctx.model, ctx.x = model, x
        return model(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor]:
        with torch.enable_grad():
            x = ctx.x.detach().requires_grad_()
            ctx.model(x).backward(dy)
        return None, x.grad


@pytest.mark.parametrize(("norm", "options"), CHANGING, ids=str)
def test_other_checkpoints_are_right_or_refused(norm: str, options: dict[str, Any]) -> None:
    model, x = convert(net().double(), norm, stat_batch=2, **options), torch.randn(4, 3, 8, 8).double()
    expected = of_several(model, [x], lambda net, x: net(x), False)
    for a, b in zip(expected, of_several(model, [x], OtherCheckpoint.apply, False), strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(RuntimeError, match=r"2 forwards wait .* or torch's checkpoint"):
        of_several(model, [x, 2 * x], OtherCheckpoint.apply, False)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("variant", ["talk", "fisher", "images"])
def test_gamma_decay_sees_each_image_once(variant: str, reentrant: bool) -> None:
    model, x = convert(net(), "pn", stat_batch=2, gamma_decay=(variant, 2.0)), torch.randn(8, 3, 8, 8)
    found = []
    for how in (None, reentrant):
        twin, given = copy.deepcopy(model), x.clone().requires_grad_()
        y = twin(given) if how is None else checkpoint(twin, given, use_reentrant=how)
        y.square().mean().backward()
        finish_gradients(twin)
        found.append([p.grad for p in twin.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("how", [None, False, True])
@pytest.mark.parametrize(("norm", "options"), [("brn", {}), ("pn", {"estimator": "memory"})], ids=str)
def test_compiled_within_a_checkpoint(norm: str, options: dict[str, Any], how: bool | None) -> None:
    """What moving averages correct is corrected by those of the first forward, as in what runs once, uncompiled."""
    torch._dynamo.reset()
    layer, x = NORMS[norm](4, stat_batch=2, **options), torch.randn(8, 4, 5, 5)
    for step in range(2):
        layer(x * (step + 2))
    twin = copy.deepcopy(layer)
    compiled = torch.compile(twin, backend="aot_eager")
    v = torch.randn_like(x)
    (layer(x) * v).sum().backward()
    given = x.clone().requires_grad_()
    y = compiled(given) if how is None else checkpoint(compiled, given, use_reentrant=how)
    (y * v).sum().backward()
    for a, b in zip(layer.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad)


class AskingInside(nn.Module):
    """Functions in checkpoints, of which one asks for the class of a layer and one is a checkpoint again."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.reentrant, self.stem, self.body = reentrant, net()[:3], net()[3:6]

    def checkpoint(self, function: Any, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return function(x)  # type: ignore[no-any-return]
        return checkpoint(function, x, use_reentrant=self.reentrant)  # type: ignore[no-any-return]

    def inner(self, x: Tensor) -> Tensor:
        for layer in self.body:
            x = layer(x)
            if type(layer) is nn.BatchNorm2d:
                x = x * torch.linspace(-2, 2, 8)[:, None, None]
        return x

    def forward(self, x: Tensor) -> Tensor:
        x = self.checkpoint(lambda y: self.checkpoint(self.inner, y).sin(), self.stem(x))
        return self.checkpoint(self.inner, x)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("norm", ["bn", "bkn"])
def test_functions_in_checkpoints_that_ask_for_classes_and_are_nested(norm: str, reentrant: bool) -> None:
    """They run again when the forward around them is over."""
    found, x = [], torch.randn(8, 3, 8, 8)
    for how in (None, reentrant):
        torch.manual_seed(0)
        found.append(gradients(convert(AskingInside(how), norm, stat_batch=2), x, None)[0])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
