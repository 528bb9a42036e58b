"""The normalizers: each combines a statistics set (paper Eq. 8) with an estimator. Needs torch alone.

`norm(x)` returns y. Kalman normalizers also take and return beliefs (belief.py): `norm(x, beliefs=b)`, b a Belief about
x or () if there is none, returns `Estimated(y, belief)`.
`NORMS[name](num_features, *, stat_batch=None, **options)` builds a normalizer.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from kalmannorm.norm.batch import BatchNorm, GroupedStatistics
from kalmannorm.norm.constant import FrozenBatchNorm, NoNorm
from kalmannorm.norm.group import GroupNorm, channel_groups
from kalmannorm.norm.instance_batch import InstanceBatchNorm
from kalmannorm.norm.kalman import Estimator, KalmanBatchNorm2d, KalmanGroupNorm
from kalmannorm.norm.options import hands_on
from kalmannorm.norm.population import PopulationNorm, SplitBatchNorm
from kalmannorm.norm.renorm import BatchRenorm
from kalmannorm.norm.sparse import SparseSwitchableNorm
from kalmannorm.norm.switchable import SwitchableNorm
from kalmannorm.norm.sync import SyncBatchNorm
from kalmannorm.norm.weight import WeightNorm, initialize_weight_norm, normalize_weights
from kalmannorm.norm.whitening import IterNorm, Whitening, ZCANorm
from kalmannorm.presets import SYNONYMS


@hands_on(SplitBatchNorm)
def _bn(
    num_features: int,
    *,
    mean_batch: str | None = None,
    var_batch: str | None = None,
    gamma_decay: tuple[str, float] | None = None,
    gamma_cap: float | None = 1.0,
    **options: Any,
) -> BatchNorm:
    if mean_batch is var_batch is gamma_decay is None:
        return BatchNorm(num_features, **options)
    if gamma_decay is None:
        return SplitBatchNorm(num_features, mean_batch=mean_batch, var_batch=var_batch, **options)
    if mean_batch is not None or var_batch is not None:
        raise ValueError("gamma_decay is of groups that mean and deviation share: leave out mean_batch, var_batch")
    # PopulationNorm over groups of stat_batch images computes BN, and knows gamma decay.
    return PopulationNorm(num_features, gamma_decay=gamma_decay, gamma_cap=gamma_cap, **options)


# Every normalizer is built with the same arguments: those without batch statistics or moving averages ignore
# stat_batch and momentum.
@hands_on(GroupNorm)
def _gn(
    num_features: int, *, stat_batch: int | None = None, momentum: float | None = None, **options: Any
) -> GroupNorm:
    return GroupNorm(num_features, **options)


@hands_on(GroupNorm, "num_groups", "max_groups")
def _ln(
    num_features: int, *, stat_batch: int | None = None, momentum: float | None = None, **options: Any
) -> GroupNorm:
    return GroupNorm(num_features, num_groups=1, **options)


@hands_on(GroupNorm, "num_groups", "max_groups")
def _in(
    num_features: int, *, stat_batch: int | None = None, momentum: float | None = None, **options: Any
) -> GroupNorm:
    return GroupNorm(num_features, num_groups=num_features, **options)


@hands_on(FrozenBatchNorm)
def _frozen(num_features: int, *, stat_batch: int | None = None, **options: Any) -> FrozenBatchNorm:
    return FrozenBatchNorm(num_features, **options)


@hands_on(WeightNorm)
def _wn(
    num_features: int, *, stat_batch: int | None = None, eps: float | None = None, momentum: float | None = None
) -> WeightNorm:
    return WeightNorm()


@hands_on(NoNorm)
def _none(
    num_features: int, *, stat_batch: int | None = None, eps: float | None = None, momentum: float | None = None
) -> NoNorm:
    return NoNorm()


@hands_on(KalmanGroupNorm)
def _gkn(
    num_features: int,
    *,
    stat_batch: int | None = None,
    momentum: float | None = None,
    num_groups: int | None = None,
    max_groups: int = 32,
    **options: Any,
) -> KalmanGroupNorm:
    return KalmanGroupNorm(channel_groups(num_features, num_groups, max_groups), num_features, **options)


class _Norms(dict[str, Callable[..., nn.Module]]):
    """Constructors of normalizers by name. The papers' other names (SYNONYMS) are found too, but not listed."""

    def __missing__(self, name: str) -> Callable[..., nn.Module]:
        if name not in SYNONYMS:
            raise KeyError(name)
        return self[SYNONYMS[name]]


NORMS = _Norms(
    {
        "bn": _bn,
        "brn": BatchRenorm,
        "gn": _gn,
        "ln": _ln,
        "in": _in,
        "wn": _wn,
        "sn": SwitchableNorm,
        "bkn": KalmanBatchNorm2d,
        "gkn": _gkn,
        "syncbn": SyncBatchNorm,
        "ibn": InstanceBatchNorm,
        "ssn": SparseSwitchableNorm,
        "zca": ZCANorm,
        "itern": IterNorm,
        "pn": PopulationNorm,
        "frozen": _frozen,
        "none": _none,
    }
)

__all__ = [
    "NORMS",
    "BatchNorm",
    "BatchRenorm",
    "Estimator",
    "FrozenBatchNorm",
    "GroupNorm",
    "GroupedStatistics",
    "InstanceBatchNorm",
    "IterNorm",
    "KalmanBatchNorm2d",
    "KalmanGroupNorm",
    "NoNorm",
    "PopulationNorm",
    "SparseSwitchableNorm",
    "SplitBatchNorm",
    "SwitchableNorm",
    "SyncBatchNorm",
    "WeightNorm",
    "Whitening",
    "ZCANorm",
    "initialize_weight_norm",
    "normalize_weights",
]
