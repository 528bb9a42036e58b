"""Table 2: parameters of networks, counted from the models when the table is made; nothing is trained for it."""

import functools
import json
from collections.abc import Mapping
from typing import Any

from kalmannorm.report import caption, paper
from kalmannorm.report.read import Records
from kalmannorm.report.render import Sheet, Text
from kalmannorm.report.table import suffix

Card = Mapping[str, Any]


def sheet(card: Card, found: Records) -> Sheet:
    """A row per network, a column per normalizer; a card as table.py has it, `columns` with overrides."""
    header, rows, records, differing = ["network"], [], [], []
    for column in card["columns"]:
        header += [column["label"], f"{column['label']} (paper)"]
    for row in card["rows"]:
        line = [Text(row["label"])]
        for column in card["columns"]:
            config = row["configs"][column["key"]]
            parameters = count(config)
            printed = paper.value(f"{card['paper']}.{row['key']}.{column['key']}")
            line += [
                Text(f"{parameters / 1e6:.2f} ({parameters:,})"),
                Text("–" if printed is None else f"{printed:.2f}"),
            ]
            records.append(_record(config, parameters, printed))
            if printed is not None and f"{parameters / 1e6:.2f}" != f"{printed:.2f}":
                differing.append(f"{row['label']} with {column['label']}")
        rows.append(line)

    classes = caption.distinct([c for row in card["rows"] for c in row["configs"].values()], "dataset", "classes")
    labelled = [
        {"label": column["label"], "config": config}
        for row in card["rows"]
        for column in card["columns"]
        if (config := row["configs"].get(column["key"]))
    ]
    said = (
        f"Parameters in millions at {' / '.join(map(str, classes))} classes, in brackets exactly, counted from the "
        "models. KN has, beside BN's gamma and beta, one gain q per normalizer and R, where its preset learns them, "
        f"also in the normalizers without a prior. {caption.estimators(labelled)}"
    )
    verdict = (
        f"Not the paper's printed digits: {', '.join(differing)}."
        if differing
        else "All counts equal the paper's to its printed digits."
    )
    below = ("Paper: the printed value, in millions, never a counted one.", verdict)
    stem = "_".join([card["name"], *suffix(card)])
    return Sheet(stem, card["title"], said, tuple(header), 1, rows, (), below, tuple(records))


def count(config: Mapping[str, Any]) -> int:
    """Parameters of the network that a run of this config trains."""
    return _count(json.dumps(config))


@functools.cache  # a report makes the table for the terminal and for the files
def _count(config: str) -> int:
    from kalmannorm.train.model import parameter_count  # imports torch: this kind of card alone needs it

    return parameter_count(json.loads(config))


def _record(config: Card, count: int, printed: float | None) -> dict[str, object]:
    return {
        "network": config["arch"]["name"],
        "normalizer": config["norm"]["name"],
        "preset": config["norm"].get("preset") or "",
        "classes": config["dataset"]["classes"],
        "parameters": count,
        "paper_millions": "" if printed is None else printed,
    }
