"""Every number that the sources print, and where they contradict each other (paper_values.yaml)."""

import functools
from pathlib import Path
from typing import Any

import yaml


@functools.cache
def values() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("paper_values.yaml").read_text())
    return found


def printed(path: str) -> float | None:
    """Return the printed value at a dotted path, whose keys may hold dots; None where nothing is printed."""
    node: Any = values()
    rest = path
    while rest and isinstance(node, dict):
        key = next(
            (key for key in sorted(map(str, node), key=len, reverse=True) if f"{rest}.".startswith(f"{key}.")), None
        )
        if key is None:
            return None
        node, rest = node[key], rest[len(key) + 1 :]
    return float(node) if isinstance(node, int | float) and not rest else None


def conflicts() -> list[str]:
    """Where the sources contradict themselves or each other."""
    return [str(said) for said in values()["neurips"]["text"]["inconsistent"]]
