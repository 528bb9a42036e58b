"""The papers' printed numbers, looked up by a dotted path into paper_values.yaml."""

import functools
from pathlib import Path
from typing import Any

VALUES = Path(__file__).with_name("paper_values.yaml")


@functools.cache
def values() -> dict[str, Any]:
    """Everything the sources print, as nested dicts."""
    import yaml

    return yaml.safe_load(VALUES.read_text(encoding="utf-8"))


def entry(path: str) -> Any:
    """What stands at a path such as "neurips.table7.bn_stat2"; None when it is absent."""
    return _descend(values(), path.split("."))


def value(path: str) -> float | None:
    """The printed number at a path such as "neurips.table7.bn_stat2.moving".

    None when the sources have none there (absent, printed as a dash, or not a single number).
    """
    found = entry(path)
    return found if isinstance(found, int | float) and not isinstance(found, bool) else None


def _descend(node: Any, parts: list[str]) -> Any:
    if not parts:
        return node
    if not isinstance(node, dict):
        return None
    # A key may itself hold a dot ("inception_v2_iterations_to_73.1"): try one part, then two, ...
    for taken in range(1, len(parts) + 1):
        key = ".".join(parts[:taken])
        if key in node:
            return _descend(node[key], parts[taken:])
    return None
