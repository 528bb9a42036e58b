"""The talk's normalizers against their formulas, written out plainly: other shapes, several steps, every gradient."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import error
from torch import Tensor, nn

from kalmannorm import NORMS, set_progress
from kalmannorm.norm.modes import finish_gradients
from kalmannorm.norm.sparse import sparsestmax
from kalmannorm.norm.whitened import parametrization_of, refresh, whiten_weights

D = torch.float64


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def rows(x: Tensor) -> Tensor:
    """[N, C, ...] -> [C, values]."""
    return x.transpose(0, 1).flatten(1)


def column(t: Tensor, like: Tensor) -> Tensor:
    """[C] or [N, C], to be broadcast over pixels."""
    return t.reshape(*(t.shape if t.dim() > 1 else (1, -1)), *(1,) * (like.dim() - 2))


def uneven(layer: nn.Module) -> None:
    for name in ("weight", "bias"):
        nn.init.normal_(layer.get_parameter(name), 1.0)


def compare(layer: nn.Module, plain, shapes: list[tuple[int, ...]], tolerance: float) -> None:
    """Outputs and gradients of as many training steps as there are shapes, then in evaluation: `plain(x, training)`."""
    for training, shape in [*((True, shape) for shape in shapes), (False, shapes[0])]:
        x = torch.randn(shape, dtype=D) * 2 + torch.randn(shape[:2], dtype=D)[(..., *(None,) * (len(shape) - 2))]
        upstream, found = torch.randn_like(x), []
        for function in (layer.train(training), lambda x, training=training: plain(x, training)):
            leaf = x.clone().requires_grad_()
            y = function(leaf)
            gradients = torch.autograd.grad((y * upstream).sum(), [leaf, *layer.parameters()], allow_unused=True)
            found.append([y.detach(), *(torch.zeros(()) if g is None else g for g in gradients)])
        for a, b in zip(*found, strict=True):
            assert (a - b).abs().max() <= tolerance * max(1, b.abs().max()), (training, shape)


# --- whitening ---


def newton(cov: Tensor, iterations: int) -> Tensor:
    p, s = torch.eye(len(cov), dtype=D), cov / cov.trace()
    for _ in range(iterations):
        p = 1.5 * p - 0.5 * p @ p @ p @ s
    return p / cov.trace().sqrt()


def eigen(cov: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(cov)
    return vectors @ torch.diag(values**-0.5) @ vectors.T


SHAPES = [[(8, 5, 4, 4), (12, 5, 3, 4)], [(16, 5), (32, 5)], [(8, 7, 2, 3, 2), (4, 7, 2, 3, 2)]]


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize("group", [2, 3, 64])
@pytest.mark.parametrize("norm", ["zca", "itern"])
def test_whitening(norm: str, group: int, shapes: list[tuple[int, ...]]) -> None:
    """Groups of channels that do not divide, more of them than there are channels; averages of the mean and of W."""
    channels, per_set = shapes[0][1], 16 if len(shapes[0]) == 2 else 4
    layer = NORMS[norm](channels, stat_batch=per_set, group=group, eps=1e-3, momentum=0.2).double()
    uneven(layer)
    cuts = [range(i, min(i + group, channels)) for i in range(0, channels, group)]
    moving: list = [torch.zeros(channels, dtype=D), [torch.eye(len(cut), dtype=D) for cut in cuts]]

    def plain(x: Tensor, training: bool) -> Tensor:
        sets = len(x) // per_set
        means, roots = [moving[0]] * sets, [moving[1]] * sets
        if training:
            means = [rows(x[i::sets]).mean(1) for i in range(sets)]
            roots = []
            for i, mean in enumerate(means):
                centered = rows(x[i::sets]) - mean[:, None]
                cov = centered @ centered.T / centered.shape[1] + 1e-3 * torch.eye(channels, dtype=D)
                of = [cov[list(cut)][:, list(cut)] for cut in cuts]
                roots.append([newton(c, 5) if norm == "itern" else eigen(c) for c in of])
            moving[0] = 0.8 * moving[0] + 0.2 * sum(means).detach() / sets
            moving[1] = [0.8 * old + 0.2 * sum(r[k] for r in roots).detach() / sets for k, old in enumerate(moving[1])]
        y = torch.empty_like(x)
        for i in range(sets):
            whole = torch.block_diag(*roots[i])
            y[i::sets] = torch.einsum("dc,nc...->nd...", whole, x[i::sets] - column(means[i], x))
        return y * column(layer.weight, x) + column(layer.bias, x)

    compare(layer, plain, shapes, 1e-9)


# --- SSN ---


def sparsest(z: np.ndarray, radius: float) -> np.ndarray:
    """Step by step, as its authors do."""

    def project(v: np.ndarray) -> np.ndarray:
        s = np.sort(v)[::-1]
        k = max(i + 1 for i in range(len(s)) if s[i] > (s[: i + 1].sum() - 1) / (i + 1))
        return np.maximum(v - (s[:k].sum() - 1) / k, 0)

    w, square, before = project(z), radius**2, None
    while (w > 0).sum() > 1:
        u = (w > 0) / (w > 0).sum()
        if before is not None:
            square -= ((u - before) ** 2).sum()
        if np.linalg.norm(w - u) >= np.sqrt(square):
            return w
        q = u + np.sqrt(square) * (w - u) / np.linalg.norm(w - u)
        if q.min() >= 0:
            return q
        w, before = project(q), u
    return w


@pytest.mark.parametrize("dtype", [pytest.param(D, marks=pytest.mark.slow), torch.float32])
def test_sparsestmax(dtype: torch.dtype) -> None:
    """Logits near and far from each other, radii on both sides of every change; the Jacobian by differences."""
    radii = [0, 0.05, 0.2, 0.4, 0.407, 0.409, 0.6, 0.705, 0.709, 0.8, 0.816, 0.8165, 0.9, 1.0]
    for scale, radius in itertools.product((0.05, 0.4, 3.0), radii):
        for z in scale * torch.randn(20, 3, dtype=D):
            expected = torch.from_numpy(sparsest(z.numpy(), radius))
            found = sparsestmax(z.to(dtype), radius)
            assert (found.to(D) - expected).abs().max() < (1e-10 if dtype == D else 3e-5 / scale), (z, radius)
            if dtype == D and scale == 0.4:
                jacobian = torch.autograd.functional.jacobian(lambda z, r=radius: sparsestmax(z, r), z)
                steps = 1e-7 * np.eye(3)
                differences = np.stack(
                    [sparsest(z.numpy() + h, radius) - sparsest(z.numpy() - h, radius) for h in steps], 1
                )
                assert (jacobian - torch.from_numpy(differences) / 2e-7).abs().max() < 1e-4 * max(
                    1, jacobian.abs().max()
                )


@pytest.mark.parametrize("shapes", [[(8, 5, 4, 4), (12, 5, 3, 4)], [(8, 4, 2, 3, 2)]], ids=str)
@pytest.mark.parametrize("radius", [0.0, 0.35, 0.6, 0.9])
def test_ssn(radius: float, shapes: list[tuple[int, ...]]) -> None:
    channels, per_set = shapes[0][1], 4
    layer = NORMS["ssn"](channels, stat_batch=per_set, moving_unbiased=False).double()
    uneven(layer)
    for logits in (layer.mean_weight, layer.var_weight):
        nn.init.normal_(logits, 1.0, 0.2)
    set_progress(layer, radius)
    moving = [torch.zeros(channels, dtype=D), torch.ones(channels, dtype=D)]
    fixed = [sparsestmax(logits.detach(), radius) for logits in (layer.mean_weight, layer.var_weight)]

    def plain(x: Tensor, training: bool) -> Tensor:
        pixels = tuple(range(2, x.dim()))
        mean, second = x.mean(pixels), x.square().mean(pixels)  # of images [N, C]
        ln = [mean.mean(1, keepdim=True), second.mean(1, keepdim=True)]
        if training:
            sets = len(x) // per_set
            of = [torch.stack([t[i::sets].mean(0) for i in range(sets)]) for t in (mean, second)]
            var = of[1] - of[0].square()
            moving[0] = 0.9 * moving[0] + 0.1 * of[0].mean(0).detach()
            moving[1] = 0.9 * moving[1] + 0.1 * var.mean(0).detach()
            bn = [of[0].repeat(per_set, 1), var.repeat(per_set, 1)]
        else:
            bn = [t.expand_as(mean) for t in moving]
        a, b = (sparsestmax(t, radius) for t in (layer.mean_weight, layer.var_weight))
        if radius > 0.82:  # chosen, constants from now on
            a, b = fixed
        mixed = a[0] * mean + a[1] * ln[0] + a[2] * bn[0]
        var = b[0] * (second - mean.square()) + b[1] * (ln[1] - ln[0].square()) + b[2] * bn[1]
        y = (x - column(mixed, x)) / (column(var, x) + 1e-5).sqrt()
        return y * column(layer.weight, x) + column(layer.bias, x)

    compare(layer, plain, shapes, 1e-9)


# --- IBN ---


@pytest.mark.parametrize(("ratio", "first"), [(0.5, "in"), (0.4, "bn"), (0.3, "in")])
def test_ibn(ratio: float, first: str) -> None:
    layer = NORMS["ibn"](7, stat_batch=4, ratio=ratio, first=first).double()
    for part, _ in layer.parts:
        uneven(part)
    instance = range(int(7 * ratio)) if first == "in" else range(int(7 * (1 - ratio)), 7)
    moving = [torch.zeros(7, dtype=D), torch.ones(7, dtype=D)]

    def plain(x: Tensor, training: bool) -> Tensor:
        sets, pieces = len(x) // 4, []
        weight, bias = (torch.cat([part.get_parameter(name) for part, _ in layer.parts]) for name in ("weight", "bias"))
        of = [(x[i::sets].mean((0, 2, 3)), x[i::sets].var((0, 2, 3), correction=0)) for i in range(sets)]
        if training:
            values = 4 * x.shape[2] * x.shape[3]
            moving[0] = 0.9 * moving[0] + 0.1 * sum(m for m, _ in of).detach() / sets
            moving[1] = 0.9 * moving[1] + 0.1 * sum(v for _, v in of).detach() / sets * (
                values / (values - 1) if unbiased else 1
            )
        for n, image in enumerate(x):
            for c, own in enumerate(image):
                mean, var = own.mean(), own.var(correction=0)
                if c not in instance:
                    mean, var = (t[c] for t in (of[n % sets] if training else moving))
                pieces.append((own - mean) / (var + 1e-5).sqrt() * weight[c] + bias[c])
        return torch.stack(pieces).view_as(x)

    unbiased = bool(layer.BN.moving_unbiased)
    compare(layer, plain, [(8, 7, 3, 2), (4, 7, 3, 2)], 1e-9)


# --- PN and gamma decay ---


@pytest.mark.parametrize(("dtype", "tolerance"), [(D, 1e-9), (torch.float32, 2e-5)])
@pytest.mark.parametrize("shape", [(12, 4), (12, 4, 5), (12, 4, 3, 2), (12, 4, 2, 3, 2)], ids=str)
@pytest.mark.parametrize("variant", ["talk", "fisher", "images"])
def test_gamma_decay(variant: str, shape: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    """Each image's own gradient by a backward of its own."""
    m = 8
    layer = NORMS["pn"](4, gamma_decay=(variant, m), gamma_cap=None, eps=1e-12).to(dtype)
    uneven(layer)
    x = torch.randn(shape, dtype=dtype).exp() + torch.randn(shape[:2], dtype=dtype)[(..., *(None,) * (len(shape) - 2))]

    def losses(y: Tensor) -> Tensor:
        return (y * torch.linspace(0.5, 2, y[0].numel(), dtype=dtype).view_as(y[0])).cos().flatten(1).sum(1)

    losses(layer(x)).mean().backward()
    before = layer.weight.grad.clone()
    finish_gradients(layer)
    wide = x.double()
    axes = [0, *range(2, x.dim())]
    var, mean = torch.var_mean(wide, axes, correction=0, keepdim=True)
    h = (wide - mean) / var.sqrt()
    hbar = (h * column(layer.weight.detach(), x).double() + column(layer.bias.detach(), x).double()).requires_grad_()
    weights = torch.linspace(0.5, 2, x[0].numel(), dtype=dtype).view_as(x[0]).double()
    (of_each,) = torch.autograd.grad((hbar * weights).cos().sum(), hbar)
    flat, gradient = h.flatten(2) if x.dim() > 2 else h[..., None], of_each.reshape(*shape[:2], -1)
    f_gamma, f_beta = (gradient * flat).sum(2).square().mean(0), gradient.sum(2).square().mean(0)
    rho = flat.pow(4).mean((0, 2)) - 3
    if variant == "images":
        tau2, omega2 = flat.mean(2).var(0, correction=0), flat.square().mean(2).var(0, correction=0)
        zeta = omega2 / (8 * m) * f_gamma + tau2 / (2 * m) * f_beta
    else:
        second = torch.sigmoid(hbar.detach()).mean(axes) if variant == "talk" else f_beta
        zeta = (rho + 2) / (8 * m) * f_gamma + second / (2 * m)
    assert error(layer.decay.zeta, zeta.to(dtype)) < tolerance
    added = 2 * zeta * layer.weight.detach()
    assert (layer.weight.grad - before - added).abs().max() < 10 * tolerance * max(
        1, before.abs().max(), added.abs().max()
    )


# --- whitened weights ---


def root(covariance: Tensor, eps: float) -> Tensor:
    return eigen(covariance + eps * torch.eye(len(covariance), dtype=D))


CONVS = {
    "groups": lambda: nn.Conv2d(6, 4, 3, padding=1, groups=2),
    "stride": lambda: nn.Conv2d(6, 5, 3, stride=2, padding=1),
    "not square": lambda: nn.Conv2d(6, 5, (1, 3), (2, 1), (0, 2), (1, 2)),
    "films": lambda: nn.Conv3d(6, 4, (2, 3, 1), padding=1, groups=2),
    "sequences": lambda: nn.Conv1d(6, 5, 3),
    "without a bias": lambda: nn.Conv2d(6, 5, 3, bias=False),
    "linear": lambda: nn.Linear(6, 5),
}


SIZES = {"linear": (), "films": (3, 5, 4), "sequences": (9,)}


@pytest.mark.parametrize("kind", ["wnn", "pre_gwnn", "post_gwnn"])
@pytest.mark.parametrize("name", CONVS)
def test_whitened_weights(name: str, kind: str) -> None:
    """Two refreshes, with a momentum: P, c (or Q) per group, V and d that keep the function."""
    layer = CONVS[name]().double()
    weight, bias = layer.weight.detach().clone(), None if layer.bias is None else layer.bias.detach().clone()
    whiten_weights(layer, kind, eps=0.1, share=1.0)
    groups = getattr(layer, "groups", 1)
    mix = torch.randn(6, 6, dtype=D)
    optim = torch.optim.SGD(layer.parameters(), lr=0.0, momentum=0.5)
    for step in range(2):
        x = torch.einsum("dc,nc...->nd...", mix, torch.randn(20, 6, *SIZES.get(name, (5, 6)), dtype=D)) + step
        optim.zero_grad()
        upstream = layer(x).detach().cos()
        (layer(x) * upstream).sum().backward()
        optim.step()
        refresh(layer, [x[:8], x[8:]], optim)
        whitening = parametrization_of(layer)
        assert kind == "post_gwnn" or error(layer.weight.detach(), weight) < 1e-9
        assert bias is None or error(layer.bias.detach(), bias) < 1e-9
        for g in range(groups):
            inputs = rows(x).unflatten(0, (groups, -1))[g]
            if kind == "post_gwnn":
                continue
            covariance = torch.cov(inputs, correction=0)
            p = whitening.inner[g]
            if kind == "wnn":
                assert error(p, root(covariance, 0.1)) < 1e-8
            else:  # PCA's rows have no sign
                values = torch.linalg.eigvalsh(covariance).flip(0)
                assert error(p @ covariance @ p.T, torch.diag(values / (values + 0.1))) < 1e-8
            if bias is not None:
                assert error(whitening.center.unflatten(0, (groups, -1))[g], inputs.mean(1)) < 1e-10
        if kind == "post_gwnn":
            plain = CONVS[name]().double()
            plain.weight = nn.Parameter(layer.parametrizations.weight.original.detach())
            out = plain(x).detach()
            for g, outputs in enumerate(rows(out).unflatten(0, (groups, -1))):
                q = whitening.outer[g]
                assert error(q, root(torch.cov(outputs, correction=0), 0.1)) < 1e-8


def test_eigennet() -> None:
    """Q of the gradients at the layer's output, for labels drawn from the softmax; in the same order of draws."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 9, 5)).double()
    plain = [(layer.weight.detach().clone(), layer.bias.detach().clone()) for layer in (model[0], model[3])]
    whiten_weights(model, "eigennet", eps=0.1, outer_eps=0.5)
    x = torch.randn(30, 3, 5, 5, dtype=D)
    refresh(model, [x], generator=torch.Generator().manual_seed(3))
    h = F.conv2d(x, *plain[0]).requires_grad_()
    logits = F.linear(h.relu().flatten(1), *plain[1])
    drawn = torch.multinomial(logits.float().softmax(1), 1, generator=torch.Generator().manual_seed(3))[:, 0]
    loss = F.cross_entropy(logits.float(), drawn, reduction="sum")
    for layer, (weight, bias), at in zip((model[0], model[3]), plain, (h, logits), strict=True):
        (gradient,) = torch.autograd.grad(loss, at, retain_graph=True)
        delta = rows(gradient) @ rows(gradient).T
        delta = delta / delta.diagonal().mean()
        whitening = parametrization_of(layer)
        assert error(whitening.outer[0], root(delta, 0.5)) < 1e-6
        assert error(layer.weight.detach(), weight) < 1e-9 and error(layer.bias.detach(), bias) < 1e-9
