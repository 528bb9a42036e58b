"""A normalizer for each layer: patterns of layer names to normalizers, what `convert` takes where it takes a name."""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from kalmannorm.errors import nearest
from kalmannorm.norm import NORMS
from kalmannorm.norm.options import refuse_unknown
from kalmannorm.presets import KALMAN, NEED_BIAS, SYNONYMS

Choice = tuple[str, dict[str, Any]]  # a name of NORMS, and options
Mapped = Mapping[str, str | tuple[str, Mapping[str, Any]]]

OF_CONVERT = ("leaves", "thaw", "returns_belief")
OF_KALMAN = ("relu", "transition", "input_belief")  # what convert makes of a Kalman normalizer's options
BESIDE_KALMAN = ("preset", "predictor")


def choices(norm: str | Mapped, options: dict[str, Any]) -> dict[str, Choice]:
    """A normalizer and its options for each pattern: of a mapping, or of one name for all layers.

    ValueError: what is neither; an unknown name or option.
    """
    if isinstance(norm, str):
        kind = _known(norm)
        more = OF_CONVERT + (OF_KALMAN + BESIDE_KALMAN if kind in KALMAN else ())
        refuse_unknown(f"normalizer {kind!r}", NORMS[kind], options, more)
        return {"*": (kind, options)}
    if not isinstance(norm, Mapping):
        raise ValueError(f"norm must be a name of NORMS or a mapping of layer names to such, not {norm!r}")
    if options:
        raise ValueError(f"{next(iter(options))}: options of normalizers stand in the mapping, (name, options)")
    found: dict[str, Choice] = {}
    for pattern, entry in norm.items():
        match (entry, {}) if isinstance(entry, str) else entry:
            case (str(name), Mapping() as given):
                kind, own = _known(name, f"{pattern}: "), dict(given)
            case _:
                raise ValueError(f"{pattern}: must be a name of NORMS, or (name, options), not {entry!r}")
        if kind in NEED_BIAS:
            raise ValueError(f"{kind} is for all layers of a network: give it alone, not in a mapping")
        if "stat_batch" in own:
            raise ValueError(f"{pattern}: stat_batch is one for all layers, convert(..., stat_batch=...)")
        refuse_unknown(f"{pattern}: normalizer {kind!r}", NORMS[kind], own, OF_KALMAN if kind in KALMAN else ())
        found[pattern] = kind, own
    return found


def _known(name: str, where: str = "") -> str:
    """The name of NORMS, without synonyms: KN is BKN."""
    kind = SYNONYMS.get(name, name)
    if kind not in NORMS:
        raise ValueError(f"{where}{nearest(name, NORMS, 'normalizer')}")
    return kind


def assign(mapping: Mapping[str, Choice], layers: Iterable[str]) -> dict[str, Choice]:
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
        chosen[layer] = mapping[pattern]
    # "*" is for what is left, and may find nothing left.
    if unused := [pattern for pattern in mapping if pattern not in used and pattern != "*"]:
        raise ValueError(f"pattern {unused[0]!r} matches no normalizer's name; names are such as {next(iter(chosen))}")
    return chosen
