"""Per layer, the errors of measurement, prior and posterior against the population's statistics.

The population of a layer is its features before normalization, over all images, in a network that normalizes as in
training: every group by its own statistics (for KN, by its posterior). The features depend on how earlier layers
normalize, so each network is compared with its own population. The population's mean is the mean of all groups' means,
its variance the pooled one: the mean of the groups' variances plus the variance of their means.
"""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from kalmannorm.norm.belief import Belief
from kalmannorm.norm.modes import normalizers, probing

# The estimates that a normalizer's probe receives, in the order of the arrays' first axis. `used`: KN's posterior.
ESTIMATES = ("measured", "prior", "used")
# The whole error; its part that is the same for all groups, which gamma and beta can undo; its part that differs from
# group to group, which is noise. Per channel, the squares of the last two add up to that of the first.
PARTS = ("", "_bias", "_spread")
# Training batches whose groups are compared with the population.
ERROR_BATCHES = 16


class Population:
    """Statistics of one layer's features over all groups that are added."""

    def __init__(self) -> None:
        self.groups = 0
        self.sums: Tensor | None = None  # sums of means, squared means and variances: float64 [3, C]

    def add(self, measured: Belief) -> None:
        """Add G groups' measured means and population variances [G, C]. All groups have equally many values."""
        mean, var = measured.mean.double(), measured.var.double()
        sums = torch.stack((mean.sum(0), mean.square().sum(0), var.sum(0)))
        self.sums = sums if self.sums is None else self.sums + sums
        self.groups += len(mean)

    def belief(self) -> Belief:
        """Return the population's mean and pooled variance, float64 [C]."""
        assert self.sums is not None, "no group was added"
        mean, square, var = self.sums / self.groups
        return Belief(mean, var + (square - mean.square()).clamp_min(0))


class Errors:
    """A probe that compares every group's estimates with the population.

    Errors of the mean are in units of the population's standard deviation; errors of the variance are
    ln(estimate / population), so that half and double weigh the same. The normalizer's `eps` is added to all variances.
    """

    def __init__(self, population: Belief, eps: float) -> None:
        self.population, self.eps = Belief(population.mean.double(), population.var.double()), eps
        self.groups = 0
        self.sums: dict[str, Tensor] = {}  # per estimate, sums of errors and of their squares: [2, mean or variance, C]

    def __call__(self, *, measured: Belief, used: Belief, prior: Belief | None) -> None:
        groups = len(measured.mean)
        scale = self.population.var + self.eps
        for key, belief in (("measured", measured), ("prior", prior), ("used", used)):
            if belief is not None:
                mean = (belief.mean.double() - self.population.mean) / scale.sqrt()
                var = ((belief.var.double() + self.eps) / scale).log()
                error = torch.stack((mean, var), 1).expand(groups, -1, -1)  # a prior may have one row for all groups
                sums = torch.stack((error.sum(0), error.square().sum(0)))
                self.sums[key] = self.sums[key] + sums if key in self.sums else sums
        self.groups += groups

    def typical(self, key: str) -> Tensor:
        """Return the median over channels, [PARTS, mean or variance], of: root mean square error over the groups,
        absolute mean error, standard deviation of the error. nan if the layer has no such estimate."""
        if key not in self.sums:
            return torch.full((len(PARTS), 2), torch.nan, dtype=torch.float64)
        # On the CPU: a GPU's median is not deterministic, so deterministic=true would raise here, after the training.
        bias, square = self.sums[key].cpu() / self.groups
        parts = torch.stack((square.sqrt(), bias.abs(), (square - bias.square()).clamp_min(0).sqrt()))
        return parts.median(2).values


@torch.no_grad()
def layer_errors(
    model: nn.Module, populations: Mapping[str, Population], batches: Iterable[Tensor]
) -> dict[str, np.ndarray]:
    """Return the errors of every normalizer's estimates on the given batches, in the model's present mode and
    statistics.

    The arrays are float32 [ESTIMATES, K] for K normalizers in network order: `layer_error_mean` and `layer_error_var`,
    and each also with the suffixes "_bias" and "_spread" (PARTS). nan where a normalizer has no prior.
    """
    layers = normalizers(model)
    probes = {name: Errors(populations[name].belief(), layer.eps) for name, layer in layers.items()}
    with probing(model, dict(probes)):
        for x in batches:
            model(x)
    found = torch.stack([torch.stack([probe.typical(key) for key in ESTIMATES]) for probe in probes.values()])
    arrays = found.float().permute(2, 3, 1, 0).numpy()  # [PARTS, mean or variance, ESTIMATES, K]
    return {
        f"layer_error_{moment}{part}": arrays[i, j]
        for i, part in enumerate(PARTS)
        for j, moment in enumerate(("mean", "var"))
    }
