"""What becomes of a network in its first steps, layer by layer: why Kalman Normalization dies where it does, and what
whitening does for how well conditioned the learning is."""

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

# Per normalizer: how far the predicted mean is from the measured one, in measured standard deviations; predicted over
# measured variance, as a geometric mean; and the mean square of what the normalizer puts out before gamma and beta.
QUANTITIES = ("offsets", "variance_ratios", "scales")


class FirstSteps:
    """Watch a training's steps: the context `watching` around them, then `arrays`. Eager steps alone can be watched."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.weights = [_learned(m) for m in model.modules() if isinstance(m, nn.Conv2d)]
        self.seen: dict[str, list[Tensor]] = {name: [] for name in normalizers(model)}  # per step [QUANTITIES]
        self.gradients: list[list[Tensor]] = [[] for _ in self.weights]  # per step, its norm over the weight's
        self.losses: list[Tensor] = []  # of the training, per micro-batch
        self.conditioning = Conditioning(model)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the steps inside."""
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
        """Return `steps` and `losses` [T], QUANTITIES [T, normalizers] each (NaN: no prior), `gradients` and those of
        Conditioning [T, convolutions]."""
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
    """Return what is learned of a weight: V of a whitened one."""
    if not parametrize.is_parametrized(layer, "weight"):
        return layer.weight
    return next(layer.parametrizations.weight.parameters(recurse=False))  # type: ignore[union-attr, operator]
