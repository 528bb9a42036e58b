"""Condition numbers of a layer's two Fisher factors, E[o o^T] and E[dh dh^T], during training."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from kalmannorm.norm.whitened import Moments, WhitenedWeight, parametrization_of, whitened

FLOOR = 1e-6  # times the largest eigenvalue: smaller ones are rounding errors, or of a channel that is never active


class Conditioning:
    """Records condition numbers at every training step within the context `watching`; `arrays` returns them.

    For a convolution's weight these are the covariance of its input, o, and the second moment of the loss's gradient at
    its output, dh; for a whitened weight's V, those of P o and of Q^T dh (norm/whitened.py). The gradient is that of
    the training labels, so the block is the empirical Fisher's.
    """

    def __init__(self, model: nn.Module) -> None:
        weights: dict[nn.Module, WhitenedWeight] = {m: parametrization_of(m) for m in whitened(model).values()}
        self.layers = {m: weights.get(m) for m in model.modules() if isinstance(m, nn.Conv2d)}
        self.seen: dict[str, list[list[float]]] = {key: [[] for _ in self.layers] for key in ("inputs", "gradients")}

    @contextmanager
    def watching(self) -> Iterator[None]:
        with ExitStack() as hooks:
            for place, (layer, weight) in enumerate(self.layers.items()):
                hooks.callback(layer.register_forward_hook(self._hook(place, weight)).remove)
            yield

    def _hook(
        self, place: int, weight: WhitenedWeight | None
    ) -> Callable[[nn.Conv2d, tuple[Tensor, ...], Tensor], None]:
        def see(layer: nn.Conv2d, args: tuple[Tensor, ...], out: Tensor) -> None:
            if not (layer.training and out.requires_grad):
                return
            inputs = Moments()
            inputs.add(args[0], layer.groups)
            inner = None if weight is None else weight.inner
            self.seen["inputs"][place].append(condition_number(inputs.covariance(), inner))

            def see_gradient(gradient: Tensor) -> None:
                gradients = Moments()
                gradients.add(gradient, layer.groups)
                outer = None if weight is None else weight.outer.mT
                self.seen["gradients"][place].append(condition_number(gradients.moment(), outer))

            out.register_hook(see_gradient)

        return see

    def arrays(self) -> dict[str, np.ndarray]:
        """Return `condition_inputs` and `condition_gradients`, [T, convolutions]; {} if no step was seen."""
        steps = min(len(values) for of in self.seen.values() for values in of) if self.layers else 0
        if not steps:
            return {}
        return {f"condition_{key}": np.array([values[:steps] for values in of]).T for key, of in self.seen.items()}


def condition_number(moments: Tensor, through: Tensor | None = None) -> float:
    """Return the condition number of `through` S `through`^T, S = `moments` [groups, C, C]: the largest over groups.

    Eigenvalues below FLOOR times the largest do not count, and so neither do zero rows of `through` (pre-GWNN's, whose
    V does not learn).
    """
    if through is not None:
        through = through.to(moments)
        moments = through @ moments @ through.mT
    worst = 1.0
    for matrix in moments:
        values = torch.linalg.eigvalsh(matrix)
        values = values[values > FLOOR * values[-1].clamp(min=torch.finfo(values.dtype).tiny)]
        if len(values):
            worst = max(worst, (values[-1] / values[0]).item())
    return worst
