"""The numbers that the papers print, and the places where they contradict each other (paper_values.yaml)."""

import functools
from pathlib import Path
from typing import Any

import yaml

from kalmannorm.report.frame import flat


@functools.cache
def values() -> dict[str, Any]:
    """Return all of paper_values.yaml by dotted path."""
    return flat(yaml.safe_load(Path(__file__).with_name("paper_values.yaml").read_bytes()), "")


def printed(path: str) -> float | None:
    """Return the printed value at a dotted path; None if no number is printed there."""
    found = values().get(path)
    return float(found) if isinstance(found, int | float) else None


def conflicts() -> list[str]:
    """Return the sentences on where the sources contradict themselves or each other."""
    return [str(said) for said in values()["neurips.text.inconsistent"]]
