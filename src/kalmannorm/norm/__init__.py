"""The normalizers: a statistics set (paper Eq. 8) times an estimator. They and belief.py need torch alone.

Contract: module(x, prior: Belief | None = None) -> (y, Belief | None). Those without a belief return None.
NORMS[name](num_features, *, stat_batch=None, **options) builds one.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from kalmannorm.norm.batch import BatchNorm, GroupedStatistics
from kalmannorm.norm.group import GroupNorm, channel_groups
from kalmannorm.norm.kalman import Estimator, KalmanBatchNorm2d, KalmanGroupNorm
from kalmannorm.norm.sync import SyncBatchNorm


# Those that know no statistics batch and no moving averages are handed both all the same, and ignore them.
def _gn(
    num_features: int, *, stat_batch: int | None = None, momentum: float | None = None, **options: Any
) -> GroupNorm:
    return GroupNorm(num_features, **options)


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


NORMS: dict[str, Callable[..., nn.Module]] = {
    "bn": BatchNorm,
    "gn": _gn,
    "bkn": KalmanBatchNorm2d,
    "gkn": _gkn,
    "syncbn": SyncBatchNorm,
}

__all__ = [
    "NORMS",
    "BatchNorm",
    "Estimator",
    "GroupNorm",
    "GroupedStatistics",
    "KalmanBatchNorm2d",
    "KalmanGroupNorm",
    "SyncBatchNorm",
]
