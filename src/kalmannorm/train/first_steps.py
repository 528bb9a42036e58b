"""Record a network's first training steps layer by layer: they show where and why Kalman Normalization
fails, and how much whitening improves the conditioning."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from kalmannorm.norm.batch import GroupedStatistics, Probe
from kalmannorm.norm.belief import Belief
from kalmannorm.norm.modes import normalizers, probing
from kalmannorm.train.conditioning import Conditioning

# Per normalizer: distance of the predicted from the measured mean, in measured standard deviations; predicted over
# measured variance, as a geometric mean over channels; mean square of the output before gamma and beta.
QUANTITIES = ("offsets", "variance_ratios", "scales")


class FirstSteps:
    """Records every training step within the context `watching`; `arrays` returns the result. Eager mode only."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.weights = [_learned(m) for m in model.modules() if isinstance(m, nn.Conv2d)]
        self.seen: dict[str, list[Tensor]] = {name: [] for name in normalizers(model)}  # per step [QUANTITIES]
        self.gradients: list[list[Tensor]] = [[] for _ in self.weights]  # per step, norm over the weight's
        self.losses: list[Tensor] = []  # of training, per micro-batch
        self.conditioning = Conditioning(model)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Record the training steps that run while the context lasts."""
        probes = {name: self._probe(name, layer) for name, layer in normalizers(self.model).items()}
        with probing(self.model, probes), self.conditioning.watching(), ExitStack() as hooks:
            for weight, seen in zip(self.weights, self.gradients, strict=True):
                if weight.requires_grad:
                    hooks.callback(weight.register_post_accumulate_grad_hook(self._gradient(seen)).remove)
            yield

    def _probe(self, name: str, layer: GroupedStatistics) -> Probe:
        def probe(*, measured: Belief, used: Belief, prior: Belief | None) -> None:
            if not layer.training:
                return
            var = measured.var + layer.eps
            offset = ratio = torch.full((), torch.nan)
            if prior is not None:
                offset = ((prior.mean - measured.mean).abs() / var.sqrt()).mean()
                ratio = ((prior.var + layer.eps) / var).log().mean().exp()
            scale = ((measured.var + (measured.mean - used.mean).square()) / (used.var + layer.eps)).mean()
            self.seen[name].append(torch.stack([value.float().cpu() for value in (offset, ratio, scale)]))

        return probe

    @staticmethod
    def _gradient(seen: list[Tensor]) -> Callable[[Tensor], None]:
        def hook(weight: Tensor) -> None:
            assert weight.grad is not None
            seen.append((weight.grad.norm() / weight.detach().norm()).float().cpu())

        return hook

    def arrays(self) -> dict[str, np.ndarray]:
        """Return `steps` and `losses` [T]; each of QUANTITIES [T, normalizers], NaN without a prior; `gradients` and
        Conditioning's arrays [T, convolutions]. {} if no step was seen."""
        steps = min((len(values) for values in self.seen.values()), default=0)
        if not steps:
            return {}
        found = torch.stack([torch.stack(values[:steps]) for values in self.seen.values()], 1)
        arrays = {key: found[..., i].numpy() for i, key in enumerate(QUANTITIES)}
        gradients = [torch.stack(values[:steps]) for values in self.gradients if len(values) >= steps]
        if gradients:
            arrays["gradients"] = torch.stack(gradients, 1).numpy()
        if self.losses:
            arrays["losses"] = torch.stack(self.losses).unflatten(0, (steps, -1)).sum(1).cpu().numpy()
        return {"steps": np.arange(1, steps + 1), **arrays, **self.conditioning.arrays()}


def _learned(layer: nn.Conv2d) -> Tensor:
    """Return the parameter that is learned: the weight, or V of a whitened weight."""
    if not parametrize.is_parametrized(layer, "weight"):
        return layer.weight
    return next(layer.parametrizations.weight.parameters(recurse=False))  # type: ignore[union-attr, operator]
