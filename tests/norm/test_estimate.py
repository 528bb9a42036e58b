"""The Kalman update's two forms, native and composite: one arithmetic, and its gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPES, D, error, random_belief
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from kalmannorm import NORMS, KalmanBatchNorm2d, KalmanGroupNorm
from kalmannorm.norm import moments as belief
from kalmannorm.norm.estimate import _composite, _Native
from kalmannorm.norm.sampling import sampled_conv


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def arguments(prior: bool | str, weight: bool, dims: int, dtype: torch.dtype = D) -> list[Tensor | None]:
    """x, prior mean (None for "var"), prior variance, gain, weight, bias for 3 groups of 2 images and 4 channels."""
    x = torch.randn(6, 4, *(3, 2)[: dims - 2], dtype=dtype)
    belief = random_belief(3, 4, dtype) if prior else (None, None)
    if prior == "var":
        belief = (None, belief[1])
    gamma, beta = (torch.randn(4, dtype=dtype), torch.randn(4, dtype=dtype)) if weight else (None, None)
    made = [x, *belief, torch.tensor(0.3, dtype=dtype), gamma, beta]
    return [None if t is None else t.requires_grad_() for t in made]


def run(form: Any, mixture: bool, guard: float | None, eps: float = 1e-2) -> Callable[..., tuple[Tensor, ...]]:
    def call(x: Tensor, *others: Tensor | None) -> tuple[Tensor, ...]:
        return form(x, 2, *others, eps, mixture, guard, False)[:3]

    return call


FORMS = pytest.mark.parametrize("form", [_Native.apply, _composite], ids=["native", "composite"])


@DTYPES
@pytest.mark.parametrize("dims", [2, 3, 4])
@pytest.mark.parametrize(
    ("prior", "weight", "mixture", "guard"),
    [
        (False, True, False, None),
        (True, True, False, None),
        (True, False, True, None),
        ("var", True, True, None),
        ("var", True, False, 1e-3),
        (True, True, True, 1e-3),  # the guard holds
        (True, True, True, 1e9),  # it does not
    ],
)
def test_native_form_is_the_composite_form(
    prior: bool | str, weight: bool, mixture: bool, guard: float | None, dims: int, dtype: torch.dtype, tolerance: float
) -> None:
    inputs = arguments(prior, weight, dims, dtype)
    needed = [t for t in inputs if t is not None]
    results = []
    for form in (_Native.apply, _composite):
        out = form(inputs[0], 2, *inputs[1:], 1e-5, mixture, guard, False)
        cotangents = [torch.randn(t.shape, dtype=dtype, generator=torch.Generator().manual_seed(1)) for t in out[:3]]
        grads = torch.autograd.grad(out[:3], needed, cotangents, allow_unused=True)
        assert not out[3].requires_grad and not out[4].requires_grad
        results.append([*out, *(torch.zeros_like(n) if g is None else g for n, g in zip(needed, grads, strict=True))])
    for a, b in zip(*results, strict=True):
        assert error(a.detach(), b.detach()) <= (tolerance if b.any() else 0)


@FORMS
@pytest.mark.parametrize("dims", [2, 4])
@pytest.mark.parametrize("mixture", [False, True])
@pytest.mark.parametrize("prior", [False, True, "var"])
def test_gradients_of_the_update(form: Any, prior: bool | str, mixture: bool, dims: int) -> None:
    inputs = arguments(prior, True, dims)
    assert gradcheck(run(form, mixture, None), inputs, fast_mode=True)


@FORMS
@pytest.mark.parametrize("mixture", [False, True])
@pytest.mark.parametrize("prior", [False, True])
def test_gradients_at_zero_measured_variance(form: Any, prior: bool, mixture: bool) -> None:
    inputs = arguments(prior, True, 4)
    with torch.no_grad():
        assert inputs[0] is not None
        inputs[0][:, 1] = 0.7  # one constant channel
        inputs[0][0::3, 2] = -1.5  # another constant in one group only
    out = run(form, mixture, None)(*inputs)
    assert prior or out[2][0, 2] == 0
    assert gradcheck(run(form, mixture, None), inputs, fast_mode=True)


@FORMS
@pytest.mark.parametrize("held", [True, False])
def test_gradients_with_a_guard(form: Any, held: bool) -> None:
    """No gradient through the decision, and none to the prior where it is given up. One decision, by the mean ratio."""
    inputs = arguments(True, True, 4)
    measured = _composite(inputs[0], 2, None, None, inputs[3], None, None, 0, False, None, False)[4]  # type: ignore[arg-type]
    ratios = inputs[2].detach() / measured  # type: ignore[union-attr]
    guard = ratios.mean().item() * (0.99 if held else 1.01)
    assert (ratios > guard).any() and (ratios < guard).any()
    assert gradcheck(run(form, True, guard), inputs, fast_mode=True)
    out = run(form, True, guard)(*inputs)
    grads = torch.autograd.grad(sum(t.square().sum() for t in out), inputs)
    assert all(bool(g.any()) is not held for g in grads[1:4])
    assert (error(out[2].detach(), measured) < 1e-12) is held


@FORMS
@pytest.mark.parametrize("guard", [None, 100.0])
@pytest.mark.parametrize("var", [0.0, 1e-38])
def test_a_point_as_prior(form: Any, var: float, guard: float | None) -> None:
    """No variance in the prior, and none in one channel of the measurement: finite values and gradients."""
    inputs = arguments(True, True, 4, torch.float32)
    with torch.no_grad():
        assert inputs[0] is not None and inputs[2] is not None
        inputs[0][:, 1] = 0.7
        inputs[2].fill_(var)
    out = run(form, True, guard)(*inputs)
    grads = torch.autograd.grad(sum(t.square().sum() for t in out), inputs)
    assert all(torch.isfinite(t).all() for t in (*out, *grads))
    if guard is None:
        images = inputs[0][:, 0].view(2, 3, -1).transpose(0, 1).flatten(1)
        spread = 0.21 * (images.mean(1) - inputs[1][:, 0]).square()  # type: ignore[index]
        assert error(out[2][:, 0].detach(), (0.3 * images.var(1, correction=0) + spread).detach()) < 1e-5
        assert all(g.any() for g in grads)


@FORMS
@pytest.mark.parametrize("mixture", [True, False])
@pytest.mark.parametrize("guard", [None, 100.0, 1e-3])
def test_second_derivatives(form: Any, mixture: bool, guard: float | None) -> None:
    assert gradgradcheck(run(form, mixture, guard), arguments(True, True, 4), fast_mode=True)


@pytest.mark.parametrize("sampling", [False, True])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("kind", ["bkn", "gkn"])
def test_gradients_through_the_prior(kind: str, channels_last: bool, sampling: bool) -> None:
    """normalizer, ReLU, convolution, normalizer: gradients flow through everything, the prior included."""
    options: dict[str, Any] = {"mixture": True, "eps": 1e-2}
    if kind == "bkn":
        first, second = (KalmanBatchNorm2d(c, stat_batch=2, **options).double() for c in (2, 3))
    else:
        first, second = KalmanGroupNorm(1, 2, **options).double(), KalmanGroupNorm(3, 3, **options).double()  # type: ignore[assignment]
    images = 4
    weight = torch.randn(3, 2, 3, 3, dtype=D, requires_grad=True)
    noise = torch.randn(2 if kind == "bkn" else images, 2, 3, 3, dtype=D)
    x = torch.randn(images, 2, 3, 3, dtype=D, requires_grad=True)
    parameters = [*first.parameters(), *second.parameters()]
    names = [n for layer in (first, second) for n, _ in layer.named_parameters()]

    def network(x: Tensor, weight: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(names[: len(names) // 2], values[: len(names) // 2], strict=True))
        then = dict(zip(names[len(names) // 2 :], values[len(names) // 2 :], strict=True))
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        y, b = torch.func.functional_call(first, given, (x,), {"beliefs": ()})
        if sampling:
            prior = sampled_conv(b, noise, weight, padding=(1, 1), relu=True)
        else:
            prior = belief.conv(belief.relu(b), weight)
        y, b = torch.func.functional_call(second, then, (F.conv2d(F.relu(y), weight, padding=1),), {"beliefs": prior})
        return y, *b

    assert gradcheck(network, (x, weight, *parameters), fast_mode=True)


@pytest.mark.parametrize("norm", ["bkn", "gkn"])
def test_idle_parameters_get_zero_gradients(norm: str) -> None:
    """DDP waits for the gradients of every parameter, and an optimizer must not move those that have no part."""
    layer = NORMS[norm](6)
    layer(torch.randn(4, 6, 3, 3)).sum().backward()
    assert layer.gain_logit.grad is not None and layer.gain_logit.grad == 0
    assert layer.noise_raw.grad is not None and not layer.noise_raw.grad.any()
    layer(torch.randn(4, 6, 3, 3), beliefs=random_belief(1, 6))[0].square().sum().backward()
    assert layer.gain_logit.grad != 0 and layer.noise_raw.grad.any()
