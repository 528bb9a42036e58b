"""What every normalizer promises: one check a promise, each for a name of NORMS.

test_contract.py runs them over all the names, test_docs.py over the example of docs/add-a-normalizer.md. What spans
processes is in test_distributed.py.
"""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import Chain, Residual, affine, conv3x3, error, estimated, leaves, random_belief
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.func import functional_call

from kalmannorm import NORMS, Belief, KalmanGroupNorm, convert, fold, set_statistics
from kalmannorm.norm import BatchRenorm, Estimator, FrozenBatchNorm, GroupedStatistics
from kalmannorm.presets import KALMAN, NEED_BIAS

D = torch.float64
IMAGES, CHANNELS, STAT_BATCH = 8, 6, 2
GROUPS = IMAGES // STAT_BATCH
MAP = (4, 3)
OF_ONE_CHANNEL_OF_ONE_IMAGE = ("in", "sn", "ssn", "ibn")  # what these take statistics of, all but IN among others
# Whitening needs twice as many values as channels: two of these at a time, for the small maps here.
OPTIONS: dict[str, dict[str, Any]] = {"zca": {"group": 2}, "itern": {"group": 2}}
OF_CONVOLUTIONS = ("zca", "itern")  # what is folded into convolutions, not BatchNorm layers


def build(norm: str, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    """A layer in training mode whose parameters and moving statistics are not those of the start."""
    torch.manual_seed(0)
    layer = NORMS[norm](CHANNELS, **{"stat_batch": STAT_BATCH, **OPTIONS.get(norm, {}), **options})
    for part, channels in parts(layer):
        if getattr(part, "weight", None) is not None:
            affine(part, channels.stop - channels.start)
        if isinstance(part, GroupedStatistics | FrozenBatchNorm):
            assert part.running_mean is not None and part.running_var is not None
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 1.5)
    return layer.to(dtype).train()


def parts(layer: nn.Module) -> list[tuple[nn.Module, slice]]:
    """The layer, or where it is made of several those, and the channels of each."""
    return getattr(layer, "parts", [(layer, slice(0, CHANNELS))])


def averages(layer: nn.Module) -> tuple[GroupedStatistics | None, slice]:
    """The part that keeps moving averages."""
    found = ((part, channels) for part, channels in parts(layer) if isinstance(part, GroupedStatistics))
    return next(found, (None, slice(0, 0)))


def images(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return 2 * torch.randn(shape or (IMAGES, CHANNELS, *MAP), generator=generator, dtype=dtype) + 1


def prior_for(layer: nn.Module, x: Tensor) -> Belief | None:
    """What a Kalman normalizer expects for x; nothing for the others."""
    if not isinstance(layer, Estimator):
        return None
    torch.manual_seed(2)
    rows = len(x) if isinstance(layer, KalmanGroupNorm) else len(x) // STAT_BATCH
    return random_belief(rows, x.shape[1], x.dtype if x.dtype == D else torch.float32)


def call(layer: nn.Module, x: Tensor) -> Tensor:
    return estimated(layer, x, prior_for(layer, x))[0]


def outputs_and_gradients(layer: nn.Module, x: Tensor, prior: Belief | None) -> list[Tensor]:
    """y, and the belief that is handed on; gradients of x, of the prior and of all parameters."""
    x, prior = x.detach().requires_grad_(), None if prior is None else Belief(*leaves(*prior))
    y, belief = estimated(layer, x, prior)
    outputs = [y, *(belief or ())]
    inputs = [x, *(prior or ()), *layer.parameters()]
    return [*(t.detach() for t in outputs), *torch.autograd.grad(sum(t.cos().sum() for t in outputs), inputs)]  # type: ignore[arg-type]


def state(layer: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(layer.state_dict())


def equal_states(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


# --- one layer ---


def shapes_and_types(norm: str) -> None:
    for dtype in (torch.float32, D):
        layer = build(norm, dtype)
        for training in (True, False):
            x = images(dtype=dtype)
            for prior in (prior_for(layer, x), None):
                y, belief = estimated(layer.train(training), x, prior)
                assert y.shape == x.shape and y.dtype == dtype and torch.isfinite(y).all()
                assert (belief is not None) is isinstance(layer, Estimator)
                if belief is not None:
                    assert isinstance(belief, Belief) and belief.mean.shape == belief.var.shape
                    assert belief.mean.shape[0] in (1, GROUPS, IMAGES) and belief.mean.shape[1] == CHANNELS
                    assert belief.mean.dtype == belief.var.dtype == dtype and (belief.var >= 0).all()


def training_and_evaluation(norm: str) -> None:
    """Online statistics are those of training; moving ones treat every image by itself. Evaluation changes nothing."""
    layer, x = build(norm), images()
    before = state(layer)
    set_statistics(layer, "online")
    online = call(layer.eval(), x).detach()
    set_statistics(layer, "moving")
    moving = call(layer, x).detach()
    prior = prior_for(layer, x)
    for i in range(IMAGES):
        own = None if prior is None or len(prior.mean) != IMAGES else Belief(prior.mean[i][None], prior.var[i][None])
        assert error(estimated(layer, x[i : i + 1], own)[0].detach(), moving[i : i + 1]) < 1e-5
    assert equal_states(state(layer), before)
    assert error(call(layer.train(), x).detach(), online) < 1e-6
    assert (averages(layer)[0] is not None) is not equal_states(state(layer), before)


def autocast(norm: str) -> None:
    """bfloat16 in, statistics in float32 all the same."""
    cast, exact, conv = build(norm), build(norm), nn.Conv2d(3, CHANNELS, 3)
    image = images(IMAGES, 3, 10, 10)
    prior = prior_for(exact, torch.empty(IMAGES, CHANNELS))
    with torch.autocast("cpu", torch.bfloat16):
        x = conv(image) + 5
        assert x.dtype == torch.bfloat16
        y, belief = estimated(cast, x, prior)
    expected, of_exact = estimated(exact, x.detach().float(), prior)
    assert y.dtype in (torch.bfloat16, torch.float32) and error(y.detach().float(), expected.detach()) < 1e-2
    for found, wanted in zip(belief or (), of_exact or (), strict=True):
        assert found.dtype == torch.float32 and error(found.detach(), wanted.detach()) < 1e-5
    for key, value in state(cast).items():
        assert value.dtype in (torch.float32, torch.int64) and error(value, exact.state_dict()[key]) < 1e-5
    y.float().square().sum().backward()
    assert conv.weight.grad is not None and torch.isfinite(conv.weight.grad).all()


def channels_last(norm: str) -> None:
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        layer = build(norm, D)
        x = images(dtype=D).contiguous(memory_format=memory_format)
        results.append([*outputs_and_gradients(layer, x, prior_for(layer, x)), *layer.buffers()])
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() < 1e-12 * max(1, b.abs().max())


def two_dimensional(norm: str) -> None:
    """[N, C] is a map of one pixel, or refused where one pixel says nothing."""
    options = {"num_groups": 2} if norm in ("gn", "gkn") else {}
    flat, spatial = (build(norm, stat_batch=4, **options) for _ in range(2))
    x = images(IMAGES, CHANNELS)
    if norm in OF_ONE_CHANNEL_OF_ONE_IMAGE:
        with pytest.raises(ValueError, match="statistics of a single value"):
            flat(x)
        return
    prior = prior_for(flat, x)
    if prior is not None and not isinstance(flat, KalmanGroupNorm):
        prior = Belief(*(t[:2] for t in prior))
    found = outputs_and_gradients(flat, x, prior)
    assert found[0].shape == x.shape
    for a, b in zip(found, outputs_and_gradients(spatial, x[:, :, None, None], prior), strict=True):
        assert error(a, b.view_as(a)) < 1e-5


def gradients(norm: str) -> None:
    """Of x, of a prior and of all parameters, against finite differences. BRN's r and d, constants, are held."""
    layer = build(norm, D)
    x = images(4, CHANNELS, 2, 2, dtype=D)
    if isinstance(layer, BatchRenorm):
        held = layer.correction(torch.randn(2, CHANNELS, dtype=D), torch.rand(2, CHANNELS, dtype=D))
        layer.correction = lambda mean, var: held  # type: ignore[method-assign]
    names, values = zip(*layer.named_parameters(), strict=True) if list(layer.parameters()) else ((), ())
    beliefs = prior_for(layer, x) or ()

    def run(x: Tensor, *others: Tensor) -> Any:
        prior = Belief(*others[: len(beliefs)]) if beliefs else None
        asked = {"beliefs": prior or ()} if isinstance(layer, Estimator) else {}
        out = functional_call(layer, dict(zip(names, others[len(beliefs) :], strict=True)), (x,), asked)
        return (out[0], *out[1]) if asked else out

    inputs = [t.detach().clone().requires_grad_() for t in (x, *beliefs, *values)]
    assert gradcheck(run, inputs, fast_mode=True)


def groups_do_not_leak(norm: str) -> None:
    """A change of one image reaches its own group (or itself) alone, forward and backward."""
    changed = 1
    for training in (True, False):
        layer = build(norm).train(training)
        set_statistics(layer, "online")
        x = images()
        others = [i for i in range(IMAGES) if i % GROUPS != changed % GROUPS]
        prior = prior_for(layer, x)
        rows = GROUPS if prior is None else len(prior.mean)
        of_changed = torch.arange(rows).eq(changed % rows).view(-1, 1)
        y, b = estimated(copy.deepcopy(layer), x, prior)
        moved = x + torch.arange(IMAGES).eq(changed).view(-1, 1, 1, 1)
        z, c = estimated(layer, moved, prior and Belief(prior.mean + of_changed, prior.var))
        assert torch.equal(y[others], z[others]) and not torch.equal(y[changed], z[changed])
        for before, after in zip(b or (), c or (), strict=True):
            assert torch.equal((before != after).any(1), of_changed[:, 0])
        x = x.requires_grad_()
        (gradient,) = torch.autograd.grad(call(layer, x)[others].cos().sum(), x)
        assert not gradient[changed].any() and gradient[others].any()


def state_round_trip(norm: str) -> None:
    """All that the outputs depend on is in the state dict."""
    layer = build(norm)
    call(layer, images())
    fresh = NORMS[norm](CHANNELS, stat_batch=STAT_BATCH, **OPTIONS.get(norm, {}))
    fresh.load_state_dict(state(layer))
    for training in (False, True):
        first, second = (call(m.train(training), images()).detach() for m in (layer, fresh))
        assert torch.equal(first, second) and equal_states(state(layer), state(fresh))


def copies(norm: str) -> None:
    """Equal and independent: deepcopy and pickle."""
    layer = build(norm)
    before = state(layer)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(twin) is type(layer) and repr(twin) == repr(layer) and equal_states(state(twin), before)
        assert torch.equal(call(twin, images()), call(copy.deepcopy(layer), images()))
        assert equal_states(state(layer), before)


def running_values(norm: str) -> None:
    """Three steps, against float64 and the definitions: 0.9 old + 0.1 times the mean over the groups."""
    layer = build(norm)
    part, channels = averages(layer)
    if part is None:
        assert not any("running" in key for key in layer.state_dict()) or isinstance(layer, FrozenBatchNorm)
        return
    assert part.running_mean is not None and part.running_var is not None
    mean, var = part.running_mean.double(), part.running_var.double()
    for step in range(3):
        x = images() * (step + 1)
        prior = prior_for(layer, x)
        estimated(layer, x, prior)
        means, variances = [], []
        for g in range(GROUPS):
            values = x[g::GROUPS, channels].double().transpose(0, 1).flatten(1)
            means.append(values.mean(1))
            variances.append(values.var(1, correction=int(part.moving_unbiased)))
            if prior is not None:  # gain 1/2, R 0.02, the mixture's term
                between = (means[-1] - prior.mean[g].double()).square() / 4
                means[-1] = (means[-1] + prior.mean[g].double()) / 2
                variances[-1] = (variances[-1] + prior.var[g].double() + 0.02) / 2 + between
        mean = 0.9 * mean + 0.1 * torch.stack(means).mean(0)
        var = 0.9 * var + 0.1 * torch.stack(variances).mean(0)
    assert error(part.running_mean, mean) < 1e-6 and error(part.running_var, var) < 1e-6
    assert int(part.num_batches_tracked) == 3  # type: ignore[arg-type]


def single_values(norm: str) -> None:
    """One pixel, one image: an error that names the layer and changes nothing, or an output that depends on x."""
    layer = build(norm, stat_batch=1)
    if hasattr(layer, "layer_name"):
        layer.layer_name = "blocks.3.bn1"  # type: ignore[assignment]
    before, x = state(layer), images(4, CHANNELS, 1, 1)
    try:
        y, z = layer(x), layer(x + torch.randn_like(x))
    except ValueError as refused:
        assert str(refused).startswith("blocks.3.bn1: statistics of a single value")
        assert equal_states(state(layer), before)
    else:
        assert averages(layer)[0] is None and not torch.allclose(y, z)


def determinism(norm: str) -> None:
    found = []
    for _ in range(2):
        layer, x = build(norm), images().requires_grad_()
        y = call(layer, x)
        found.append([y, *torch.autograd.grad(y.cos().sum(), [x, *layer.parameters()]), *layer.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# --- in a network ---


def network(norm: str) -> None:
    """Trains, with a gradient for every parameter (DDP waits for them); evaluates; folds exactly, or says why not."""
    torch.manual_seed(0)
    model = convert(Residual(), norm, stat_batch=STAT_BATCH, **OPTIONS.get(norm, {}))
    x = images(IMAGES, 3, *MAP)
    model(x).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    model.eval()
    for statistics in ("online", "moving"):
        set_statistics(model, statistics)
        y = model(x)
        assert torch.isfinite(y).all()
    try:
        folded = fold(model)
    except ValueError as refused:
        assert str(refused).startswith("bn (") and "fold" in str(refused)
    else:
        plain = {type(m) for m in Residual().modules()}
        if norm in OF_CONVOLUTIONS:
            plain.remove(nn.BatchNorm2d)
        assert {type(m) for m in folded.modules()} == plain
        assert error(folded(x).detach(), y.detach()) < 1e-5
    with pytest.raises(ValueError, match=f"'{norm}'.*no_such_option"):
        convert(Residual(), norm, no_such_option=1)


def compiled(norm: str) -> None:
    """The graph that a compiler sees computes the same, forward and backward, moving statistics included. A layer
    that hands no belief on is enough of a network."""
    torch.manual_seed(0)
    alone = nn.Sequential(conv3x3(3, CHANNELS), nn.BatchNorm2d(CHANNELS))
    plain = Chain(lambda self, x: F.relu(x)) if norm in KALMAN else alone
    eager = convert(plain, norm, stat_batch=STAT_BATCH, **OPTIONS.get(norm, {}))
    twin = copy.deepcopy(eager)
    torch._dynamo.reset()
    run = torch.compile(twin, backend="aot_eager", fullgraph=True)
    x = images(4, 3, 7, 6)
    losses = [forward(x).square().mean() for forward in (eager, run)]
    for loss in losses:
        loss.backward()
    assert error(losses[1].detach(), losses[0].detach()) < 1e-5
    for (name, a), b in zip(eager.named_parameters(), twin.parameters(), strict=True):
        assert (a.grad is None) is (b.grad is None), name
        if a.grad is not None and b.grad is not None:
            assert (a.grad - b.grad).abs().max() < 1e-4 * max(1, a.grad.abs().max()), name
    for a, b in zip(eager.buffers(), twin.buffers(), strict=True):
        assert error(b, a) < 1e-5


def unknown_options(norm: str) -> None:
    """In one line, with the option that was meant."""
    for name, meant in (("stat_bach", "stat_batch"), ("epss", "eps"), ("leafs", "leaves")):
        line = f"normalizer '{norm}': unknown option '{name}'; did you mean '{meant}'\\? valid: .*"
        with pytest.raises(ValueError, match=f"^{line}$"):
            convert(Residual(), norm, **{name: 1})
    if norm not in NEED_BIAS:
        line = f"^\\*: normalizer '{norm}': unknown option 'epss'; did you mean 'eps'\\? valid: .*$"
        with pytest.raises(ValueError, match=line):
            convert(Residual(), {"*": (norm, {"epss": 1})})


CHECKS: dict[str, Callable[[str], None]] = {
    check.__name__: check
    for check in (
        shapes_and_types,
        training_and_evaluation,
        autocast,
        channels_last,
        two_dimensional,
        gradients,
        groups_do_not_leak,
        state_round_trip,
        copies,
        running_values,
        single_values,
        determinism,
        network,
        compiled,
        unknown_options,
    )
}
