"""Which normalizer each layer gets: `convert` takes one name for all, or a mapping of patterns of layer names."""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from kalmannorm.errors import nearest
from kalmannorm.norm import NORMS
from kalmannorm.norm.options import refuse_unknown
from kalmannorm.presets import KALMAN, NEED_BIAS, SYNONYMS

Choice = tuple[str, dict[str, Any]]  # a name of NORMS and the normalizer's options
Mapped = Mapping[str, str | tuple[str, Mapping[str, Any]]]

OF_CONVERT = ("leaves", "thaw", "returns_belief")
OF_KALMAN = ("relu", "transition", "input_belief")  # given beside a Kalman normalizer's options, but used by convert
BESIDE_KALMAN = ("preset", "predictor")


def choices(norm: str | Mapped, options: dict[str, Any]) -> dict[str, Choice]:
    """Return the normalizer and options for each pattern of a mapping; for a single name, the only pattern is `*`.

    ValueError: neither a name nor a mapping; an unknown name or option; an option that must be given outside of the
    mapping; a normalizer that only a whole network can have.
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
    """Return the name in NORMS, with synonyms resolved (kn is bkn). ValueError: an unknown one."""
    kind = SYNONYMS.get(name, name)
    if kind not in NORMS:
        raise ValueError(f"{where}{nearest(name, NORMS, 'normalizer')}")
    return kind


def assign(mapping: Mapping[str, Choice], layers: Iterable[str]) -> dict[str, Choice]:
    """Choose each layer's normalizer by the first `fnmatch` pattern that matches the layer's name.

    ValueError: a layer that no pattern matches; a pattern without a layer, since none matches or earlier patterns have
    taken all of them.
    """
    chosen: dict[str, Choice] = {}
    used = set()
    for layer in layers:
        pattern = next((pattern for pattern in mapping if fnmatchcase(layer, pattern)), None)
        if pattern is None:
            raise ValueError(f"no pattern for the normalizer {layer}: add '*', which matches what is left")
        used.add(pattern)
        chosen[layer] = mapping[pattern]
    # "*" stands for the remaining layers, of which there may be none.
    if unused := [pattern for pattern in mapping if pattern not in used and pattern != "*"]:
        raise ValueError(f"pattern {unused[0]!r} matches no normalizer's name; names are such as {next(iter(chosen))}")
    return chosen
