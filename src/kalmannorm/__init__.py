"""Kalman Normalization: normalizers, beliefs and conversion as a library; experiments, records and tables as a harness.

The names below are the public API. They are imported on first use, so that `kalmannorm --help` and the reading of
records do not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kalmannorm.conversion import belief_report, compile_blocks, convert, fold, prepare_compiler
    from kalmannorm.norm import NORMS, KalmanBatchNorm2d, KalmanGroupNorm, initialize_weight_norm
    from kalmannorm.norm.belief import Belief
    from kalmannorm.norm.modes import precise_statistics, set_progress, set_statistics

__version__ = "0.1.0"

_HOMES = {
    "conversion": ("belief_report", "compile_blocks", "convert", "fold", "prepare_compiler"),
    "norm": ("NORMS", "KalmanBatchNorm2d", "KalmanGroupNorm", "initialize_weight_norm"),
    "norm.belief": ("Belief",),
    "norm.modes": ("precise_statistics", "set_progress", "set_statistics"),
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
    "prepare_compiler",
    "set_progress",
    "set_statistics",
]


def __getattr__(name: str) -> Any:
    home = next((home for home, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module 'kalmannorm' has no attribute {name!r}")
    value = getattr(import_module(f"kalmannorm.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
