"""Our layers are layers like torch's: on the inputs that torch tests its own norm layers by (its ModuleInfos), every
normalizer is called, differentiated, moved, copied and refused as they are.

Each has options at which it computes what torch's BatchNorm or GroupNorm does; these are the references.
"""

import copy
import functools
import inspect
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from contract import OF_ONE_CHANNEL_OF_ONE_IMAGE
from helpers import error, quick
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call

from kalmannorm import NORMS, convert
from kalmannorm.norm import BatchRenorm, Estimator, GroupedStatistics

D = torch.float64
ALONE: dict[str, Any] = {"gain": 1.0, "learn_gain": False, "noise": False}  # the measurement alone
# What makes torch's BatchNorm of each, and its GroupNorm of the others.
AS_BATCH_NORM: dict[str, dict[str, Any]] = {
    "bn": {},
    "brn": {"rmax": 1.0, "dmax": 0.0},
    "syncbn": {},
    "pn": {},
    "bkn": {**ALONE, "moving_unbiased": True},
    "ibn": {"ratio": 0.0},
    "sn": {},  # and one weight (torch_weights)
    "ssn": {},
    "zca": {"group": 1, "moving_unbiased": True},
    "itern": {"group": 1, "moving_unbiased": True},
    "frozen": {},
}
AS_GROUP_NORM: dict[str, dict[str, Any]] = {"gn": {}, "ln": {}, "in": {}, "gkn": ALONE}
LAYERS = [*AS_BATCH_NORM, *AS_GROUP_NORM]
WITHOUT_MOVING = ("zca", "itern")  # their moving statistics are of the whitening matrix
KINDS = [f"{kind}{n}d" for kind in ("BatchNorm", "InstanceNorm") for n in (1, 2, 3)] + ["GroupNorm", "LayerNorm"]
OPTIONS = ("eps", "momentum", "affine", "track_running_stats", "bias")

all_layers = pytest.mark.parametrize("norm", LAYERS)
# A second each: three kinds of statistics stand for all where tests are to be quick, beside the contract of each.
dear_layers = pytest.mark.parametrize("norm", quick(LAYERS, "bn", "bkn", "gkn"))


def test_every_layer_is_looked_at() -> None:
    assert set(LAYERS) == NORMS.keys() - {"wn", "none"}  # which are not there


@functools.cache
def cases() -> list[tuple[dict[str, Any], tuple[int, ...]]]:
    """Options that differ from torch's own defaults, and the shape of an input [N, C, ...]: each once."""
    modules = pytest.importorskip("torch.testing._internal.common_modules", reason="of torch's own tests")
    found = {}
    for info in modules.module_db:
        if info.module_cls.__name__ not in KINDS:
            continue
        known = inspect.signature(info.module_cls)
        for given in info.module_inputs_func(info, "cpu", D, False, True):
            bound = known.bind(*given.constructor_input.args, **given.constructor_input.kwargs).arguments
            options = {key.removeprefix("elementwise_"): value for key, value in bound.items()}
            (x,) = given.forward_input.args
            if "no_batch_dim" in given.desc:
                continue
            kept = {key: options[key] for key in OPTIONS if key in options}
            found[repr((sorted(kept.items()), x.shape))] = kept, tuple(x.shape)
    return list(found.values())


def build(norm: str, channels: int, like_torch: bool = False, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    if norm in AS_GROUP_NORM:
        options = {key: value for key, value in options.items() if key not in ("momentum", "track_running_stats")}
        options |= {"num_groups": groups(norm, channels)} if norm in ("gn", "gkn") else {}
    if norm == "frozen":
        options = {key: value for key, value in options.items() if key in ("eps", "device", "dtype")}
    if norm in ("zca", "itern"):
        options = {"group": 2, **options}
    if like_torch:
        options |= {**AS_BATCH_NORM, **AS_GROUP_NORM}[norm]
    layer = NORMS[norm](channels, **options)
    if like_torch and norm in ("sn", "ssn"):  # the part of BN alone
        for logits in (layer.mean_weight, layer.var_weight):
            logits.data = torch.tensor([-1e3, -1e3, 1e3]).to(logits)  # type: ignore[union-attr, operator]
            logits.requires_grad_(False)  # type: ignore[union-attr, operator]
    return layer.train()


def groups(norm: str, channels: int) -> int:
    return {"ln": 1, "in": channels}.get(norm, 1 if channels % 2 else 2)


def reference(norm: str, shape: tuple[int, ...], options: dict[str, Any]) -> nn.Module:
    channels = shape[1]
    if norm in AS_GROUP_NORM:
        options = {key: value for key, value in options.items() if key in ("eps", "affine", "bias")}
        return nn.GroupNorm(groups(norm, channels), channels, **options)
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)]
    if norm == "frozen":
        return kind(channels, options.get("eps", 1e-5)).eval()
    return kind(channels, **options)


def affine_of(norm: str, layer: nn.Module) -> nn.Module:
    """The module that holds gamma and beta."""
    return layer.BN if norm == "ibn" else layer  # type: ignore[return-value]


def pair(norm: str, shape: tuple[int, ...], options: dict[str, Any]) -> tuple[nn.Module, nn.Module]:
    """Ours and torch's with the same parameters, not those of the start, in float64."""
    ours, theirs = build(norm, shape[1], True, **options).to(D), reference(norm, shape, options).to(D)
    with torch.no_grad():
        for key in ("weight", "bias"):
            mine, other = getattr(affine_of(norm, ours), key), getattr(theirs, key)
            if norm != "frozen":
                assert (mine is None) is (other is None), key
            if other is not None:
                mine.copy_(other.copy_(torch.randn_like(other)))
    return ours, theirs


def refuses(norm: str, shape: tuple[int, ...]) -> bool:
    """Whether the layer has too few values to measure."""
    pixels = torch.Size(shape[2:]).numel()
    if norm in OF_ONE_CHANNEL_OF_ONE_IMAGE:
        return pixels == 1 and norm != "ibn"  # here of BN's part alone
    return False


def inputs(shape: tuple[int, ...], dtype: torch.dtype = D) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(shape, dtype=dtype) * 2 + 1


def layouts(x: Tensor) -> Iterator[Tensor]:
    """x in every memory format, and as a view of something larger."""
    yield x
    if x.dim() == 4:
        yield x.contiguous(memory_format=torch.channels_last)
    if x.dim() == 5:
        yield x.contiguous(memory_format=torch.channels_last_3d)
    yield x.repeat(2, *(1,) * (x.dim() - 1))[: len(x)].transpose(0, 1).contiguous().transpose(0, 1)
    yield torch.stack([x, x], -1)[..., 0]


def derivatives(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """y, its first derivatives, and the second ones of a loss with the gradient of x in it."""
    x = x.detach().requires_grad_()  # keeps the memory format
    torch.manual_seed(2)
    v = torch.randn(x.shape, dtype=x.dtype)
    y = layer(x)
    wanted = [x, *(p for name, p in layer.named_parameters() if p.requires_grad)]
    first = torch.autograd.grad((y * v).sum(), wanted, create_graph=True)
    second = torch.autograd.grad((y * v).square().sum() + first[0].square().sum(), wanted)
    return [y, *first, *second]


@dear_layers
def test_values_and_derivatives_are_torchs(norm: str) -> None:
    """First and second ones, of input and parameters, in training and evaluation; moving statistics of two steps. Each
    case in another memory layout."""
    for number, (options, shape) in enumerate(cases()):
        if not shape[0] or refuses(norm, shape):
            continue
        every = list(layouts(inputs(shape)))
        x = every[number % len(every)]
        ours, theirs = pair(norm, shape, options)
        for training in (True, False):
            if norm in WITHOUT_MOVING and not training and options.get("track_running_stats", True):
                continue
            ours.train(training)
            theirs.train(training and norm != "frozen")
            for step in (1, 2) if training else (1,):
                found, expected = derivatives(ours, x * step), derivatives(theirs, x * step)
                if norm == "frozen":  # no parameters
                    expected = [expected[0], expected[1], expected[2 + (len(expected) - 3) // 2]]
                assert len(found) == len(expected), (options, shape)
                for a, b in zip(found, expected, strict=True):
                    tolerance = 1e-6 * max(1, float(b.abs().max()))
                    assert (a - b).abs().max() < tolerance, (options, shape, training, x.stride())
        state = affine_of(norm, ours).state_dict()
        for key, value in theirs.state_dict().items():
            assert norm == "ssn" or error(state[key].to(D), value.to(D)) < 1e-9, (key, options, shape)


@dear_layers
@pytest.mark.parametrize("training", [True, False])
def test_derivatives_by_finite_differences(norm: str, training: bool) -> None:
    """As built, with the learned parts: torch's gradcheck and gradgradcheck, in every memory layout."""
    x = inputs((4, 4, 2, 2))
    layer = build(norm, 4, stat_batch=2).to(D).train(training)
    if isinstance(layer, BatchRenorm):  # r and d are constants
        held = layer.correction(torch.randn(2, 4, dtype=D), torch.rand(2, 4, dtype=D))
        layer.correction = lambda mean, var: held  # type: ignore[method-assign]
    names, values = zip(*layer.named_parameters(), strict=True) if list(layer.parameters()) else ((), ())

    def run(x: Tensor, *others: Tensor) -> Any:
        return functional_call(layer, dict(zip(names, others, strict=True)), (x,))

    for one in layouts(x):
        leaves = [t.detach().requires_grad_() for t in (one, *values)]
        assert gradcheck(run, leaves, fast_mode=True)
        assert gradgradcheck(run, leaves, fast_mode=True)


@dear_layers
def test_memory_formats_are_kept(norm: str) -> None:
    for shape, memory_format in (((4, 4, 3, 5), torch.channels_last), ((4, 4, 3, 2, 5), torch.channels_last_3d)):
        layer = build(norm, 4, stat_batch=2).to(D)
        for training in (True, False):
            layer.train(training)
            y = layer(inputs(shape))
            z = copy.deepcopy(layer)(inputs(shape).contiguous(memory_format=memory_format))
            assert y.is_contiguous() and z.is_contiguous(memory_format=memory_format)
    for options, shape in cases():
        if not refuses(norm, shape) and not (norm == "ibn" and len(shape) == 2):
            assert build(norm, shape[1], True, **options)(inputs(shape, torch.float32)).is_contiguous()


@dear_layers
def test_copies_and_state(norm: str) -> None:
    """Saved whole and as a state dict, with torch's keys; the parts that options leave out are not there."""
    for options, shape in cases():
        layer = build(norm, shape[1], True, **options)
        expected = reference(norm, shape, options).state_dict()
        found = affine_of(norm, layer).state_dict()
        assert expected.keys() <= found.keys(), (options, shape)
        if norm in ("bn", "brn", "syncbn", "pn", "gn", "ln", "in"):
            assert list(expected) == list(found)
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
        fresh = build(norm, shape[1], True, **options)
        fresh.load_state_dict(layer.state_dict())
        for other in (twin, fresh, copy.deepcopy(layer)):
            assert type(other) is type(layer) and repr(other) == repr(layer)
            assert all(
                torch.equal(a, b) for a, b in zip(other.state_dict().values(), layer.state_dict().values(), strict=True)
            )


@dear_layers
def test_devices_and_types_of_construction(norm: str) -> None:
    """`device=` and `dtype=`; on the device meta, shapes alone."""
    for options, shape in cases():
        wide = build(norm, shape[1], **options, dtype=D)
        floating = [t for t in (*wide.parameters(), *wide.buffers()) if t.is_floating_point()]
        assert all(t.dtype == D for t in floating)
        plain = build(norm, shape[1], **options)
        assert list(wide.state_dict()) == list(plain.state_dict())
        for a, b in zip(wide.state_dict().values(), plain.state_dict().values(), strict=True):
            assert error(a.to(D), b.to(D)) < 1e-6
        layer = build(norm, shape[1], True, **options, device="meta")
        assert all(t.is_meta for t in (*layer.parameters(), *layer.buffers()))
        if shape[0] and not refuses(norm, shape):
            for training in (True, False):
                if training and options.get("momentum", 0.1) is None:
                    continue  # torch's BatchNorm reads the number of batches, too
                y = layer.train(training)(torch.empty(shape, device="meta"))
                assert y.is_meta and y.shape == shape


@all_layers
def test_half_types(norm: str) -> None:
    """A layer of halves rounds no more than torch's does."""
    shape = (8, 8, 6, 6)
    for dtype in (torch.bfloat16, torch.float16):
        ours, theirs = (layer.to(dtype) for layer in pair(norm, shape, {}))
        x = inputs(shape).to(dtype)
        exact = copy.deepcopy(theirs).to(D)(x.to(D))
        rounded, reference_rounded = ours(x), theirs(x)
        assert rounded.dtype == dtype
        off = [float((y.to(D) - exact).abs().max()) for y in (rounded, reference_rounded)]
        assert off[0] <= 1.01 * off[1], (dtype, off)
        built = build(norm, 8, stat_batch=2, dtype=dtype)
        x = x.requires_grad_()
        y = built(x)
        y.square().sum().backward()
        assert y.dtype == x.dtype and x.grad is not None and torch.isfinite(x.grad).all()


@all_layers
@pytest.mark.parametrize("stat_batch", [2, None])
def test_batches_of_no_images(norm: str, stat_batch: int | None) -> None:
    """Pass, with a gradient of 0 for every parameter, and leave the moving statistics as they are."""
    for shape in ((0, 4, 5, 5), (0, 4, 9), (0, 4, 2, 2, 2)):
        layer = build(norm, 4, stat_batch=stat_batch)
        before = copy.deepcopy(layer.state_dict())
        for training in (True, False):
            x = torch.empty(shape, requires_grad=True)
            y = layer.train(training)(x)
            assert y.shape == shape
            y.sum().backward()
            if training:
                assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())
        assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    if isinstance(layer, Estimator):
        y, belief = layer(torch.empty(0, 4, 5, 5), beliefs=())
        assert y.shape == (0, 4, 5, 5) and belief.mean.shape[1] == 4


@all_layers
def test_models_on_batches_of_no_images(norm: str) -> None:
    for predictor in ("closed", "sampling") if norm in ("bkn", "gkn") else (None,):
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.SiLU()
        )
        model = convert(
            model, norm, stat_batch=2, predictor=predictor, **({"group": 2} if norm in WITHOUT_MOVING else {})
        )
        y = model(torch.empty(0, 3, 9, 9))
        assert y.shape == (0, 4, 5, 5)
        y.sum().backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
        assert all(torch.isfinite(b).all() for b in model.buffers())


@all_layers
def test_shapes_that_do_not_fit_are_named(norm: str) -> None:
    """The layer, its channels and the input's shape, before anything changes."""
    layer = build(norm, 4, stat_batch=2)
    layer.layer_name = "blocks.3.bn1"  # type: ignore[assignment]
    before = copy.deepcopy(layer.state_dict())
    for training in (True, False):
        layer.train(training)
        for shape in ((4, 1, 5, 5), (4, 8, 5, 5), (4, 3, 5), (4, 9)):
            with pytest.raises(ValueError, match=r"blocks\.3\.bn1: expected 4 channels, got \(4, "):
                layer(torch.randn(shape))
        with pytest.raises(ValueError, match=r"blocks\.3\.bn1: expected an input \[N, C, \.\.\.\], got \(4,\)"):
            layer(torch.randn(4))
        for dtype in (torch.int64, torch.bool, torch.complex64):
            with pytest.raises(ValueError, match=rf"blocks\.3\.bn1: expected .* floating-point type, got {dtype}"):
                layer(torch.ones(4, 4, 5, 5, dtype=dtype))
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    with pytest.raises(ValueError, match=r"eps must not be negative, not -1\.0"):
        build(norm, 4, eps=-1.0)


@all_layers
def test_parameters_are_reset(norm: str) -> None:
    """As torch's layers do it, by which models that were built without memory get their values."""
    if not hasattr(layer := build(norm, 4, stat_batch=2), "reset_parameters"):
        return
    fresh = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(7)
    layer.reset_parameters()  # type: ignore[operator]
    for (name, value), start in zip(layer.named_parameters(), fresh.parameters(), strict=True):
        torch.testing.assert_close(value, start, msg=name)


def without(what: str) -> Callable[[int], nn.Module]:
    return {
        "gamma and beta": lambda c: nn.BatchNorm2d(c, affine=False),
        "beta": lambda c: nn.BatchNorm2d(c, bias=False),
        "moving statistics": lambda c: nn.BatchNorm2d(c, track_running_stats=False),
    }[what]


@all_layers
@pytest.mark.parametrize("what", ["gamma and beta", "beta", "moving statistics"])
def test_what_the_original_is_without(norm: str, what: str) -> None:
    """The converted model is without it too: no other keys, and (but for constants) no other parameters."""
    layer = without(what)
    original = nn.Sequential(nn.Conv2d(3, 4, 3), layer(4), nn.ReLU(), nn.Conv2d(4, 4, 3), layer(4))
    model = convert(original, norm, stat_batch=2, **({"group": 2} if norm in WITHOUT_MOVING else {}))
    if norm not in ("frozen", "ibn"):
        assert {key for key in original.state_dict() if "running" not in key and "tracked" not in key} == {
            key for key in model.state_dict() if key.endswith((".weight", ".bias"))
        }
    assert norm == "frozen" or what != "moving statistics" or not any("running" in key for key in model.state_dict())
    model(torch.randn(4, 3, 9, 9)).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    assert model(torch.randn(3, 3, 9, 9)).shape == (3, 4, 5, 5)  # evaluation takes any number of images


def test_layers_without_moving_statistics_have_nothing_to_average() -> None:
    layer = NORMS["bkn"](4, stat_batch=2, track_running_stats=False)
    assert isinstance(layer, GroupedStatistics) and layer.running_mean is None and not layer.uses_moving
    with pytest.raises(ValueError, match="estimator='memory' needs moving statistics"):
        NORMS["pn"](4, estimator="memory", track_running_stats=False)
