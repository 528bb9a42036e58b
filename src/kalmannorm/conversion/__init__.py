"""Convert any model and back: normalizers are replaced, and beliefs handed from one to the next by one table of rules
(operations.py)."""

from kalmannorm.conversion.api import INPUT_BELIEF, belief_report, convert, fold, is_converted, untraced
from kalmannorm.conversion.compiled import compile_blocks, prepare_compiler

__all__ = [
    "INPUT_BELIEF",
    "belief_report",
    "compile_blocks",
    "convert",
    "fold",
    "is_converted",
    "prepare_compiler",
    "untraced",
]
