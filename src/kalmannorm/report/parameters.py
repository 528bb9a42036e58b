"""Table 2: the networks' numbers of parameters, counted from the models when the table is made, without training."""

import functools

from kalmannorm.experiments import card as cards
from kalmannorm.experiments.card import Card, Settings
from kalmannorm.experiments.config import compose
from kalmannorm.report import paper
from kalmannorm.report.sheet import Place, Sheet


def sheet(card: Card) -> Sheet:
    """Return a table with a row per network and two columns per normalizer: counted and printed in the paper."""
    header = [name for column in card.columns for name in (column.label, f"{column.label}: paper")]
    rows, records, differing = [], [], []
    for row in card.rows:
        line: list[Place] = []
        for column in card.columns:
            parameters = count(card.settings(row, column))
            printed = paper.printed(f"{card.paper}.{row.key}.{column.key}")
            shown, there = f"{parameters / 1e6:.2f}", "–" if printed is None else f"{printed:.2f}"
            line += [Place(f"{shown} ({parameters:,})"), Place(there)]
            differing += [f"{row.label} with {column.label}"] if there not in (shown, "–") else []
            of = {"network": row.key, "normalizer": column.key}
            records.append(of | {"parameters": parameters, "paper_millions": printed})
        rows.append(tuple(line))
    said = "Millions, in brackets exactly, counted from the models. "
    said += f"Not the printed digits: {', '.join(differing)}." if differing else "All equal the printed digits."
    about = (
        "KN has, beside BN's gamma and beta, one gain q per normalizer and R per channel, also where there is no "
        "prior. Paper: the printed value, never a counted one.",
    )
    index = tuple(("", row.label) for row in card.rows)
    return Sheet(card.name, card.title, said, about, tuple(header), index, tuple(rows), (), tuple(records))


def count(settings: Settings) -> int:
    """Count the parameters of the network that runs of these settings train."""
    return _count(tuple(cards.overrides(settings)))


@functools.cache  # a report counts for the table and for the claims
def _count(overrides: tuple[str, ...]) -> int:
    from kalmannorm.train.model import parameter_count  # imports torch: this alone needs it

    return parameter_count(compose([*overrides]).result())
