"""Kalman Normalization: normalizers, beliefs and conversion as a library; experiments, records and tables as a harness.

The names below are the public API. They are imported on first use, so that `kalmannorm --help` and the reading of
records do not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kalmannorm.conversion import belief_report, compile_blocks, convert, fold
    from kalmannorm.norm import NORMS, KalmanBatchNorm2d, KalmanGroupNorm, initialize_weight_norm
    from kalmannorm.norm.belief import Belief
    from kalmannorm.norm.modes import precise_statistics, set_progress, set_statistics

__version__ = "0.1.0"

_HOME = {
    "Belief": "kalmannorm.norm.belief",
    "KalmanBatchNorm2d": "kalmannorm.norm",
    "KalmanGroupNorm": "kalmannorm.norm",
    "NORMS": "kalmannorm.norm",
    "belief_report": "kalmannorm.conversion",
    "compile_blocks": "kalmannorm.conversion",
    "convert": "kalmannorm.conversion",
    "fold": "kalmannorm.conversion",
    "initialize_weight_norm": "kalmannorm.norm",
    "precise_statistics": "kalmannorm.norm.modes",
    "set_progress": "kalmannorm.norm.modes",
    "set_statistics": "kalmannorm.norm.modes",
}

__all__ = [
    "NORMS",
    "Belief",
    "KalmanBatchNorm2d",
    "KalmanGroupNorm",
    "belief_report",
    "compile_blocks",
    "convert",
    "fold",
    "initialize_weight_norm",
    "precise_statistics",
    "set_progress",
    "set_statistics",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'kalmannorm' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
