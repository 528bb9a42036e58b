"""Whitened weights: a layer's weight is W = Q V P, where V is learned; P, which whitens the layer's input, and Q, which
whitens its output or the gradient there, are constants between refreshes (the talk, part 1; Desjardins et al. 2015;
Luo 2017).

This is a parametrization of the weights, not a layer: h = V P (o - c) + d is the layer's own convolution of o by V P,
with the bias d - (sum of the taps of V P) c, and so exact at zero-padded borders too. The graph, beliefs and
normalizers do not change.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from kalmannorm.norm.batch import GroupedStatistics
from kalmannorm.norm.belief import Belief
from kalmannorm.norm.moments import conv_covariance
from kalmannorm.norm.whitening import inverse_sqrt

Layer = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear
KINDS = ("wnn", "pre_gwnn", "post_gwnn", "eigennet")
MOMENTA = ("transform", "zero")


class WhitenedWeight(nn.Module):
    """The parametrization V -> Q V P, for every tap and group of channels of a convolution or linear layer.

    whiten_weights registers it and describes the kinds.
    """

    inner: Tensor  # P [groups, C_in / groups, C_in / groups]
    outer: Tensor  # Q [groups, C_out / groups, C_out / groups]
    center: Tensor  # c [C_in]
    refreshes: Tensor  # number so far
    jump: Tensor  # rms change of the outputs at the last refresh, relative to their rms around the mean

    def __init__(self, layer: Layer, kind: str, eps: float, outer_eps: float, share: float) -> None:
        super().__init__()
        self.groups = 1 if isinstance(layer, nn.Linear) else layer.groups
        self.kind, self.eps, self.outer_eps, self.share = kind, eps, outer_eps, share
        self.weight_decay = 0.0  # of W, applied by finish_gradients: the optimizer's would decay V
        c_out, c_in = (size // self.groups for size in (layer.weight.shape[0], layer.weight.shape[1] * self.groups))
        for name, size in (("inner", c_in), ("outer", c_out)):
            self.register_buffer(name, torch.eye(size).expand(self.groups, -1, -1).to(layer.weight).clone())
        self.register_buffer("center", layer.weight.new_zeros(c_in * self.groups))
        self.register_buffer("refreshes", torch.tensor(0))
        self.register_buffer("jump", torch.zeros(()))

    def forward(self, v: Tensor) -> Tensor:
        return self._between(self.outer, v, self.inner)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return self._between(self._inverse(self.outer), weight, self._inverse(self.inner)).detach()

    def decay(self, v: Tensor) -> Tensor:
        """Return the gradient of |W|^2 / 2 by V."""
        return self.pull_back(self(v))

    def pull_back(self, weight: Tensor) -> Tensor:
        """Return V's gradient, given W's (`weight`)."""
        return self._between(self.outer.mT, weight, self.inner.mT)

    def push_forward(self, gradient: Tensor) -> Tensor:
        """Return W's gradient, given V's: the inverse of pull_back."""
        return self._between(self._inverse(self.outer).mT, gradient, self._inverse(self.inner).mT)

    def of_center(self, weight: Tensor) -> Tensor:
        """Return (sum of the taps of W) c, [C_out]."""
        taps = weight.flatten(2).sum(2) if weight.dim() > 2 else weight
        return torch.einsum(
            "goi,gi->go", taps.unflatten(0, (self.groups, -1)), self.center.view(self.groups, -1)
        ).flatten()

    def _inverse(self, matrix: Tensor) -> Tensor:
        """Invert P or Q; for `pre_gwnn`, which drops rows (they are orthogonal), return the pseudo-inverse."""
        if self.kind != "pre_gwnn":
            return torch.linalg.inv(matrix)
        squares = matrix.square().sum(-1, keepdim=True)
        return (matrix / torch.where(squares > 0, squares, 1)).mT

    def _between(self, left: Tensor, weight: Tensor, right: Tensor) -> Tensor:
        parts = weight.unflatten(0, (self.groups, -1)).reshape(self.groups, -1, weight.shape[1], weight[0, 0].numel())
        return torch.einsum("gab,gbit,gij->gajt", left, parts, right).reshape(weight.shape)


class WhitenedBias(nn.Module):
    """The parametrization d -> d - (sum of the taps of W) c of a layer's bias."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.__dict__["layer"] = (layer,)  # a tuple, since a module in an attribute would be registered

    def _of_center(self) -> Tensor:
        (layer,) = self.__dict__["layer"]
        parametrization = parametrization_of(layer)
        return parametrization.of_center(layer.weight)

    def forward(self, d: Tensor) -> Tensor:
        return d - self._of_center()

    def right_inverse(self, bias: Tensor) -> Tensor:
        return (bias + self._of_center()).detach()


def whiten_weights(
    model: nn.Module, kind: str, *, eps: float = 0.01, outer_eps: float = 1.0, share: float = 0.99
) -> None:
    """Parametrize every convolution and Linear of `model`. Until the first refresh P and Q are the identity and c is 0.

    kind:
        `wnn`: P = (S + eps)^(-1/2) of the covariance S of the layer's input over images and pixels (ZCA; PRONG).
        `pre_gwnn`: P has only the leading eigenvectors, up to `share` of the trace; the rest of V gets no gradient.
            A refresh that drops eigenvectors changes the function: `jump` says by how much.
        `post_gwnn`: Q whitens the layer's output (no P), and a refresh changes the function. Without truncation, so
            that Batch Norm keeps its number of channels (ours).
        `eigennet`: P as in `wnn`, and Q = (D + outer_eps)^(-1/2) of the second moment D of the loss's gradient at the
            output, scaled to mean diagonal 1, with labels drawn from the model's own output. No channel is dropped: the
            source's rule is unknown.

    eps 0.01 (of the values that the sources searched) and the share are ours. So is outer_eps: whitening gradients
    needs far more damping. Layers without a bias have no c and d: Batch Norm follows them, and neither would change its
    output. ValueError: an unknown kind; a layer that is parametrized already.
    """
    if kind not in KINDS:
        raise ValueError(f"whitened weights are of kind {', '.join(KINDS)}, not {kind!r}")
    for name, layer in list(model.named_modules()):
        if isinstance(layer, Layer):
            if parametrize.is_parametrized(layer):
                raise ValueError(f"{name}: its weight is parametrized already")
            weight = WhitenedWeight(layer, kind, eps, outer_eps, share)
            parametrize.register_parametrization(layer, "weight", weight)
            if layer.bias is not None and kind != "post_gwnn":
                parametrize.register_parametrization(layer, "bias", WhitenedBias(layer))


def parametrization_of(layer: nn.Module) -> WhitenedWeight:
    """Return a layer's WhitenedWeight. ValueError: its weight is not whitened."""
    if not _is_whitened(layer):
        raise ValueError(f"{type(layer).__name__} has no whitened weight")
    return layer.parametrizations.weight[0]  # type: ignore[index, union-attr, return-value]


def _is_whitened(layer: nn.Module) -> bool:
    return parametrize.is_parametrized(layer, "weight") and isinstance(layer.parametrizations.weight[0], WhitenedWeight)  # type: ignore[index, union-attr]


def whitened(model: nn.Module) -> dict[str, Layer]:
    """Return the layers with whitened weights, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Layer) and _is_whitened(m)}


def whitened_parameters(model: nn.Module) -> list[tuple[WhitenedWeight, nn.Parameter]]:
    """Return each layer's parametrization and its V."""
    return [(parametrization_of(layer), _learned(layer, "weight")) for layer in whitened(model).values()]


def _learned(layer: nn.Module, name: str) -> nn.Parameter:
    """Return a layer's learned V (name "weight") or d (name "bias")."""
    return layer.parametrizations[name].original  # type: ignore[index, union-attr, return-value]


def fold_weights(model: nn.Module) -> None:
    """Replace V (and d) by W (and the bias), and remove the parametrizations."""
    for layer in whitened(model).values():
        kind = type(layer)  # removal changes the class, which copies of the model share: give the layer its own
        body = {key: value for key, value in kind.__dict__.items() if key not in ("__dict__", "__weakref__")}
        layer.__class__ = type(kind.__name__, kind.__bases__, body)
        for key in ("bias", "weight"):
            if parametrize.is_parametrized(layer, key):
                parametrize.remove_parametrizations(layer, key)


@dataclass
class Moments:
    """Count, sum [groups, C] and sum of x x^T [groups, C, C] of samples, with C the channels of a group.

    In float64, in which E[x x^T] - E[x] E[x]^T does not cancel.
    """

    count: float = 0.0
    first: Tensor = field(default_factory=lambda: torch.zeros(()))
    second: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, x: Tensor, groups: int) -> None:
        """Add samples x [N, C, ...]: every pixel is one."""
        rows = x.detach().transpose(0, 1).flatten(1).unflatten(0, (groups, -1)).double()
        self.count += rows.shape[-1]
        self.first, self.second = self.first.to(rows) + rows.sum(-1), self.second.to(rows) + rows @ rows.mT

    def over_ranks(self) -> None:
        """Sum over all processes."""
        if dist.is_initialized():
            together = torch.cat([self.first.flatten(), self.second.flatten(), self.first.new_tensor([self.count])])
            dist.all_reduce(together)
            first, second, count = together.split([self.first.numel(), self.second.numel(), 1])
            self.first, self.second = first.view_as(self.first), second.view_as(self.second)
            self.count = float(count)

    @property
    def mean(self) -> Tensor:
        return self.first / self.count

    def moment(self) -> Tensor:
        """Return the second moment E[x x^T], [groups, C, C]."""
        return self.second / self.count

    def covariance(self) -> Tensor:
        mean = self.mean.unsqueeze(-1)
        return self.moment() - mean @ mean.mT


def refresh(
    model: nn.Module,
    batches: Iterable[Tensor],
    optimizer: torch.optim.Optimizer | None = None,
    *,
    momentum: str = "transform",
    generator: torch.Generator | None = None,
    inputs: Mapping[nn.Module, Belief] | None = None,
) -> None:
    """Compute new P, Q and c for all whitened layers from one pass over `batches` [N, C, H, W], and change V and d so
    that the model computes the same as before (but for `pre_gwnn` and `post_gwnn`, see whiten_weights).

    The pass is in evaluation mode with online statistics, over groups as in training: it changes nothing else in the
    model. momentum="transform" turns the optimizer's momentum into that of the same gradients of W under the new P and
    Q; "zero" clears it. In a distributed run every process calls this with its part of the samples. `generator` draws
    EigenNet's labels. For the layers in `inputs` (conversion.flow.beliefs_of_inputs), post-GWNN's Q whitens the
    covariance predicted from the input's belief and the weights (moments.conv_covariance), not a measured one.
    ValueError: no batch, or an unknown `momentum`.
    """
    if momentum not in MOMENTA:
        raise ValueError(f"momentum must be 'transform' or 'zero', not {momentum!r}")
    layers = whitened(model)
    moments = _measure(model, layers, batches, generator)
    for layer in layers.values():
        for each in moments[layer]:
            each.over_ranks()
        _refresh_layer(layer, *moments[layer], optimizer, momentum, (inputs or {}).get(layer))


def _measure(
    model: nn.Module,
    layers: dict[str, Layer],
    batches: Iterable[Tensor],
    generator: torch.Generator | None,
) -> dict[nn.Module, tuple[Moments, Moments]]:
    """Return the moments of every layer's input, and of its output (`post_gwnn`) or the gradient there (`eigennet`)."""
    moments: dict[nn.Module, tuple[Moments, Moments]] = {m: (Moments(), Moments()) for m in layers.values()}
    kinds: dict[nn.Module, str] = {layer: parametrization_of(layer).kind for layer in layers.values()}
    backwards = "eigennet" in kinds.values()
    if generator is None:
        generator = torch.Generator().manual_seed(0)

    def see(layer: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        groups = parametrization_of(layer).groups
        moments[layer][0].add(args[0], groups)
        if kinds[layer] == "eigennet":
            out.register_hook(lambda gradient: moments[layer][1].add(gradient, groups))
        elif kinds[layer] == "post_gwnn":
            moments[layer][1].add(out, groups)

    modes = {module: module.training for module in model.modules()}
    statistics = {m: m.statistics for m in model.modules() if isinstance(m, GroupedStatistics)}
    hooks = [layer.register_forward_hook(see) for layer in moments]
    model.eval()
    for norm in statistics:
        norm.statistics = "online"
    try:
        seen = False
        for batch in batches:
            seen = True
            with torch.set_grad_enabled(backwards):
                logits = model(batch)
            if backwards:
                drawn = torch.multinomial(logits.detach().float().softmax(1).cpu(), 1, generator=generator)[:, 0]
                loss = F.cross_entropy(logits.float(), drawn.to(logits.device), reduction="sum")
                # Only to run the hooks: unlike backward, grad leaves the parameters' own gradients alone.
                torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
        if not seen:
            raise ValueError("whitened weights need at least one batch of samples")
    finally:
        for hook in hooks:
            hook.remove()
        for norm, kind in statistics.items():
            norm.statistics = kind
        for module, training in modes.items():
            module.training = training
    return moments


@torch.no_grad()
def _refresh_layer(
    layer: Layer,
    inner: Moments,
    outer: Moments,
    optimizer: torch.optim.Optimizer | None,
    momentum: str,
    believed: Belief | None,
) -> None:
    """Refresh one layer, given the moments of its input and output; `believed`: the belief about its input."""
    whitening, v = parametrization_of(layer), _learned(layer, "weight")
    d = _learned(layer, "bias") if parametrize.is_parametrized(layer, "bias") else None
    weight = layer.weight.double()
    shift = whitening.of_center(layer.weight)
    whitening.double()  # the matrices are inverted below
    buffer = _momentum(optimizer, v)
    gradient = None if buffer is None else whitening.push_forward(buffer.double())

    covariance = inner.covariance()
    if whitening.kind in ("wnn", "eigennet"):
        whitening.inner.copy_(_root(covariance, whitening.eps))
    elif whitening.kind == "pre_gwnn":
        whitening.inner.copy_(_leading(covariance, whitening.eps, whitening.share))
    if whitening.kind == "eigennet":
        scaled = outer.moment() / outer.moment().diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp(min=1e-30)
        whitening.outer.copy_(_root(scaled, whitening.outer_eps))
    elif whitening.kind == "post_gwnn":  # from the covariance of the output before Q
        if believed is None:
            undo = torch.linalg.inv(whitening.outer)
            before = undo @ outer.covariance() @ undo.mT
        else:
            var = believed.var.double().view(whitening.groups, -1)
            before = conv_covariance(var.diag_embed(), v, whitening.groups)
        whitening.outer.copy_(_root(before, whitening.eps))
    old_center = whitening.center.clone()
    if d is not None:
        whitening.center.copy_(inner.mean.flatten())
    new_v = v.double() if whitening.kind == "post_gwnn" else whitening.right_inverse(weight)
    changed = whitening(new_v)
    if buffer is not None and gradient is not None:
        of_d = None if d is None else _momentum(optimizer, d)
        if of_d is not None:
            # Part of W's gradient comes through the bias, which contains c: that has changed.
            moved = of_d.double()[:, None] * _per_group(old_center - whitening.center, whitening, weight)
            gradient = gradient + moved.view(*moved.shape, *(1,) * (weight.dim() - 2))
        buffer.copy_(whitening.pull_back(gradient) if momentum == "transform" else torch.zeros_like(gradient))
    v.copy_(new_v)
    whitening.to(v.dtype)
    whitening.refreshes += 1
    whitening.jump.copy_(_difference(changed, weight, covariance, whitening.groups))
    if d is not None:
        d.copy_(d - shift + whitening.of_center(layer.weight))


def _momentum(optimizer: torch.optim.Optimizer | None, parameter: nn.Parameter) -> Tensor | None:
    return None if optimizer is None else optimizer.state.get(parameter, {}).get("momentum_buffer")


def _per_group(center: Tensor, whitening: WhitenedWeight, weight: Tensor) -> Tensor:
    """Expand a center [C_in] to the shape of the weight's channels, [C_out, C_in / groups]."""
    rows = center.view(whitening.groups, 1, -1)
    return rows.expand(-1, weight.shape[0] // whitening.groups, -1).flatten(0, 1)


def _root(covariance: Tensor, eps: float) -> Tensor:
    return inverse_sqrt(covariance + eps * torch.eye(covariance.shape[-1]).to(covariance))


def _leading(covariance: Tensor, eps: float, share: float) -> Tensor:
    """Return eigenvectors in rows [..., d, d], scaled to variance 1; zeros for those beyond `share` of the trace."""
    values, vectors = torch.linalg.eigh(covariance)
    values, vectors = values.flip(-1).clamp(min=0), vectors.flip(-1)
    before = values.cumsum(-1) - values
    kept = before < share * values.sum(-1, keepdim=True)
    return (kept * (values + eps).rsqrt()).unsqueeze(-1) * vectors.mT


def _difference(new: Tensor, old: Tensor, covariance: Tensor, groups: int) -> Tensor:
    """Return the outputs' rms change relative to their rms around the mean, as if pixels were independent."""

    def size(weight: Tensor) -> Tensor:
        return conv_covariance(covariance, weight, groups).diagonal(dim1=-2, dim2=-1).sum().clamp(min=0)

    return (size(new - old) / size(old).clamp(min=1e-30)).sqrt()
