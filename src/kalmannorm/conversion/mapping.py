"""A normalizer for each layer: patterns of layer names to normalizers, what `convert` takes where it takes a name."""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

Choice = tuple[str, dict[str, Any]]  # a name of NORMS, and options
Mapped = Mapping[str, str | tuple[str, Mapping[str, Any]]]


def assign(mapping: Mapped, layers: Iterable[str]) -> dict[str, Choice]:
    """Each layer's normalizer, by the first of the `fnmatch` patterns that matches its name.

    ValueError: a pattern that matches no layer, or none that an earlier one has not taken; a layer without a pattern.
    """
    chosen: dict[str, Choice] = {}
    used = set()
    for layer in layers:
        pattern = next((pattern for pattern in mapping if fnmatchcase(layer, pattern)), None)
        if pattern is None:
            raise ValueError(f"no pattern for the normalizer {layer}: add '*', which matches what is left")
        used.add(pattern)
        value = mapping[pattern]
        chosen[layer] = (value, {}) if isinstance(value, str) else (value[0], dict(value[1]))
    # "*" is for what is left, and may find nothing left.
    if unused := [pattern for pattern in mapping if pattern not in used and pattern != "*"]:
        raise ValueError(f"pattern {unused[0]!r} matches no normalizer's name; names are such as {next(iter(chosen))}")
    return chosen
