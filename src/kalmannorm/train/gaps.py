"""Variance gaps: the distance between the variances that normalize and the moving variances (Figure 5)."""

from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn

from kalmannorm.data.batches import EvaluationBatches
from kalmannorm.norm import Estimator
from kalmannorm.norm.belief import Belief
from kalmannorm.norm.modes import normalizers, probing, set_statistics, shard_noise
from kalmannorm.train.layer_errors import ERROR_BATCHES, Population, layer_errors

# Bins of consecutive statistics groups, along Figure 5's horizontal axis.
GAP_BINS = 64
# Two variances of every group: the measured one, and the one used to normalize (for KN the posterior).
KINDS = ("measured", "used")


class Gaps:
    """A probe that sums |variance - moving variance| of a normalizer's groups, per channel and bin of consecutive
    groups. In the same pass it collects the population's statistics.

    `moving`: the moving variance [C]. `groups`: how many there will be. `keep`: whether to keep every group's gap too.
    """

    def __init__(self, moving: Tensor, groups: int, keep: bool) -> None:
        self.moving, self.groups = moving, groups
        bins = min(GAP_BINS, groups)
        self.sums = {key: torch.zeros(len(moving), bins, dtype=torch.float64) for key in KINDS}
        self.counts = torch.zeros(bins, dtype=torch.float64)
        self.raw: dict[str, list[Tensor]] = {key: [] for key in KINDS}
        self.seen, self.keep = 0, keep
        self.population = Population()

    def __call__(self, *, measured: Belief, used: Belief, prior: Belief | None) -> None:
        count = measured.var.shape[0]
        bins = (torch.arange(self.seen, self.seen + count) * len(self.counts)) // self.groups
        self.seen += count
        self.population.add(measured)
        self.counts.index_add_(0, bins, torch.ones(count, dtype=torch.float64))
        for key, belief in (("measured", measured), ("used", used)):
            gap = (belief.var - self.moving).abs().cpu()
            self.sums[key].index_add_(1, bins, gap.T.double())
            if self.keep:
                self.raw[key].append(gap.half())

    def relative(self, key: str, eps: float) -> float:
        """Return the mean over channels and groups of the gap over the moving variance (+ the normalizer's eps)."""
        per_channel = self.sums[key].sum(1) / self.counts.sum()
        return (per_channel / (self.moving.cpu() + eps)).mean().item()


@torch.no_grad()
def variance_gaps(
    model: nn.Module,
    train: EvaluationBatches,
    last: tuple[str, ...],
    grad_batch: int,
    stat_batch: int,
    images: int | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Measure the gaps of Figure 5, between every group's variance and the moving variance, on the training images.

    The images are not augmented; with `images`, only the first so many in the fixed order. The errors of every layer's
    estimates (layer_errors.py) are measured on the first batches. `last`: names of the last normalizers.

    Returns:
        The small arrays to be saved beside the record. Of the last normalizers, with their channels concatenated
        (`last_channels` has the number of each): `gap_measured`, `gap_used` [C, bins] and `moving_var` [C]. Per
        normalizer: `layer_gap_measured`, `layer_gap_used` and `layer_error_...`.
        The raw gaps of the last normalizers, [groups, C] in half precision.
    """
    layers = normalizers(model)
    order = train.fixed_order()[:images]
    groups = -(-len(order) // stat_batch)
    probes = {}
    for name, layer in layers.items():
        assert layer.running_var is not None
        probes[name] = Gaps(layer.running_var.clone(), groups, keep=name in last)
    shard_noise(model, (0, 1))
    set_statistics(model, "online")
    model.eval()
    with probing(model, dict(probes)):
        for x, _, _ in train.unaugmented(grad_batch, order, fill=stat_batch):
            model(x)
    first = islice(train.unaugmented(grad_batch, order, fill=stat_batch), ERROR_BATCHES)
    errors = layer_errors(model, {name: probe.population for name, probe in probes.items()}, (x for x, _, _ in first))
    set_statistics(model, "moving")
    arrays = {
        "last_channels": np.array([len(probes[name].moving) for name in last]),
        "moving_var": torch.cat([probes[name].moving for name in last]).float().cpu().numpy(),
    }
    raw = {}
    # Without a Kalman normalizer the measured variance is the one used: one kind is enough.
    for key in KINDS if any(isinstance(layer, Estimator) for layer in layers.values()) else KINDS[:1]:
        relative = [probe.relative(key, layers[name].eps) for name, probe in probes.items()]
        arrays[f"layer_gap_{key}"] = np.array(relative, dtype=np.float32)
        arrays[f"gap_{key}"] = (
            torch.cat([probes[name].sums[key] / probes[name].counts for name in last]).float().numpy()
        )
        raw[key] = np.concatenate(
            [np.concatenate([part.numpy() for part in probes[name].raw[key]]) for name in last], 1
        )
    return arrays | errors, raw
