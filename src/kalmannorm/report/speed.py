"""Table 3: training speed of two networks, from the measurements in results/speed/ and nothing else.

A measurement, made by runs/measure_speed.py, is one JSON file: both rows' configurations, the seconds of each of their
alternating steps, and the host. Each measurement is a row of the table.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from kalmannorm.errors import UserError
from kalmannorm.experiments.card import Card
from kalmannorm.experiments.measurement import FOLDER, Measurement, where
from kalmannorm.report import paper
from kalmannorm.report.sheet import Place, Sheet


def read(results: Path, card: Card) -> list[Measurement]:
    """Return the measurements of a card, those with the largest input first. UserError: a damaged file."""
    keys = {row.key for row in card.rows}
    found = []
    for path in sorted((results / FOLDER).glob("[!.]*.json")):  # hidden files are still being written
        try:
            measurement = json.loads(path.read_text())
            if measurement["id"] != path.stem or not keys <= measurement["configs"].keys():
                raise ValueError
            pairs = [measurement["seconds"][key] for key in keys]
            if len({len(seconds) for seconds in pairs}) != 1 or not all(s > 0 for seconds in pairs for s in seconds):
                raise ValueError
            describe(measurement, card.rows[0].key)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(f"{path} is not a whole measurement: move it away, or delete it to measure again") from None
        if measurement["experiment"] == card.name:
            found.append(measurement)

    def order(measurement: Measurement) -> tuple[Any, ...]:
        of, host = measurement["configs"][str(card.baseline)], where(measurement["host"])
        return of["size"], of["batch"]["grad_batch"], host, of["compile"], measurement["id"]

    return sorted(found, key=order, reverse=True)


def sheet(card: Card, results: Path) -> Sheet:
    """Return a table with a row for every measurement, and the paper's values last. UserError: the card does not have
    two rows."""
    if len(card.rows) != 2:
        raise UserError(f"{card.name} compares two rows, this is {card.rows[0].key} alone: leave out rows=")
    base, other = sorted(card.rows, key=lambda row: row.key != card.baseline)
    index, rows, records = [], [], []
    for measurement in read(results, card):
        found = ratios(measurement, base.key, other.key)
        low, middle, high = quartiles(found)
        rates = {
            key: measurement["configs"][key]["batch"]["grad_batch"] / median(seconds)
            for key, seconds in measurement["seconds"].items()
        }
        index.append(("", describe(measurement, base.key)))
        rows.append(
            (
                *(Place(f"{rates[row.key]:.2f}") for row in (base, other)),
                Place(f"{middle:.3f} [{low:.3f}, {high:.3f}]"),
                Place(str(len(found))),
            )
        )
        host = measurement["host"]
        for row in (base, other):
            below, of_row, above = quartiles(measurement["seconds"][row.key])
            config = measurement["configs"][row.key]
            records.append(
                {
                    "row": row.key, "examples_per_s": rates[row.key], "seconds_per_step": of_row, "seconds_low": below,
                    "seconds_high": above, "ratio": middle, "ratio_low": low, "ratio_high": high, "n": len(found),
                    "paper_examples_per_s": paper.printed(f"{card.paper}.{row.key}"), "network": config["arch"]["name"],
                    "normalizer": config["norm"]["name"], "size": config["size"], **config["batch"],
                    "precision": config["precision"], "compile": config["compile"], "hardware": host["hardware"],
                    "threads": host["threads"], "started": host["started"], "commit": host["git"]["commit"],
                    "torch": host["versions"]["torch"], "measurement": measurement["id"],
                }
            )  # fmt: skip
    printed = [paper.printed(f"{card.paper}.{row.key}") for row in (base, other)] + [paper.printed(card.paper_ratio)]
    index.append(("", f"paper ({card.paper_setting}; resolution and batch are not printed)"))
    rows.append((*(Place("–" if value is None else f"{value}") for value in printed), Place("")))
    header = (f"{base.label}, examples/s", f"{other.label}, examples/s", "ratio", "n")
    said = (
        "Training steps on synthetic images, on one device; both networks take turns step by step in one process, n "
        "times each. Ratio: of speeds, the median over neighbouring steps, in brackets the middle half."
    )
    about = (card.note, "The paper's row: printed values, of another machine than any measured here.")
    return Sheet(card.name, card.title, said, about, header, tuple(index), tuple(rows), (), tuple(records))


def describe(measurement: Measurement, row: str) -> str:
    """Write device, resolution, batches and arithmetic: "AMD EPYC, 2 threads; 64x64 px, (32, 32), fp32, eager"."""
    config = measurement["configs"][row]
    width, batch = config["arch"].get("width", 1), config["batch"]
    narrow = f", width {width:g}" if width != 1 else ""
    pair = f"({batch['grad_batch']}, {batch['stat_batch'] or '–'})"
    said = f"{config['size']}x{config['size']} px, {pair}{narrow}, {config['precision']}"
    return f"{where(measurement['host'])}; {said}, {'compiled' if config['compile'] else 'eager'}"


def ratios(measurement: Measurement, base: str, other: str) -> list[float]:
    """Return the speed of `base` over that of `other`, for each pair of neighbouring steps."""
    seconds = measurement["seconds"]
    return [slow / fast for fast, slow in zip(seconds[base], seconds[other], strict=True)]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return first quartile, median and third quartile; of fewer than four values least, median and greatest."""
    low, high = (min(values), max(values)) if len(values) < 4 else quantiles(values, n=4)[::2]
    return low, median(values), high
