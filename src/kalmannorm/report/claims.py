"""The papers' claims as hypotheses about records: the entries of claims.yaml."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kalmannorm.report import paper, quantities
from kalmannorm.report.hypotheses import Hypothesis

CLAIMS = Path(__file__).with_name("claims.yaml")


@dataclass(frozen=True)
class Term:
    """One side of a claim: a row of a card under a kind of statistics, added or subtracted."""

    sign: int
    card: str
    row: str
    column: str | None
    statistics: str

    def __str__(self) -> str:
        column = f" @ {self.column}" if self.column else ""
        return f"{self.card}/{self.row}{column} ({self.statistics})"


@dataclass(frozen=True)
class Claim:
    """An entry of claims.yaml."""

    id: str
    text: str
    where: str
    contrast: tuple[Term, ...]
    hypothesis: Hypothesis
    quantity: str
    at: float | None
    datasets: tuple[str, ...]
    relative: bool
    margin_why: str
    paper: float | Mapping[str, float] | None
    conflicts: tuple[str, ...]

    @property
    def unit(self) -> str:
        """Of the values, for print."""
        if self.quantity == "steps_saved":
            return "% fewer steps"
        return "%" if self.relative else quantities.UNITS[self.quantity]

    def printed(self, dataset: str) -> float | None:
        """The paper's value on a data set."""
        return self.paper.get(dataset) if isinstance(self.paper, Mapping) else self.paper


@functools.cache
def claims() -> tuple[Claim, ...]:
    """All entries of claims.yaml."""
    import yaml

    return tuple(parse(entry) for entry in yaml.safe_load(CLAIMS.read_text(encoding="utf-8")))


def conflicts() -> list[str]:
    """Where the sources contradict themselves or each other."""
    found: list[str] = paper.entry("neurips.text.inconsistent")
    return found


def parse(entry: Mapping[str, Any]) -> Claim:
    """An entry. Raises ValueError: a key that there is not, or not beside another; a conflict that is not listed."""
    known = {"id", "text", "where", "contrast", "quantity", "at", "relative", "expect", "than", "margin", "margin_why"}
    if unknown := set(entry) - known - {"datasets", "paper", "conflict"}:
        raise ValueError(f"claim {entry.get('id')}: unknown keys {', '.join(unknown)}")
    if "at" in entry and "quantity" in entry:
        raise ValueError(f"claim {entry['id']}: only an accuracy can be read at a part of the steps")
    beginnings = entry.get("conflict", [])
    found = tuple(said for beginning in beginnings for said in conflicts() if said.startswith(beginning))
    if len(found) != len(beginnings):
        raise ValueError(f"claim {entry['id']}: `inconsistent` of paper_values.yaml does not have all of {beginnings}")
    hypothesis = Hypothesis(entry["expect"], float(entry.get("than", 0)), float(entry.get("margin", 0)))
    return Claim(
        id=entry["id"],
        text=entry["text"],
        where=entry["where"],
        contrast=tuple(_term(text) for text in entry["contrast"]),
        hypothesis=hypothesis,
        quantity=entry.get("quantity", "accuracy"),
        at=entry["at"][0] / entry["at"][1] if "at" in entry else None,
        datasets=tuple(entry.get("datasets", ())),
        relative=entry.get("relative", False),
        margin_why=entry.get("margin_why", ""),
        paper=entry.get("paper"),
        conflicts=found,
    )


def _term(text: str) -> Term:
    reference, _, statistics = text[1:].strip().partition(" ")
    card, _, row = reference.partition("/")
    row, _, column = row.partition("@")
    return Term({"+": 1, "-": -1}[text[0]], card, row, column or None, statistics or "moving")
