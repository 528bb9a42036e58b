"""Conversion of any model: normalizers swapped, beliefs handed from one to the next by one table of rules
(operations.py), and the way back."""

from kalmannorm.conversion.api import INPUT_BELIEF, belief_report, convert, fold, is_converted, untraced
from kalmannorm.conversion.compiled import compile_blocks

__all__ = ["INPUT_BELIEF", "belief_report", "compile_blocks", "convert", "fold", "is_converted", "untraced"]
