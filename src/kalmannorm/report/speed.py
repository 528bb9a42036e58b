"""Table 3: training speed of two networks, from the measurements in results/speed/ and from nothing else.

A measurement (runs/measure_speed.py makes it) is one JSON file: both rows' configurations, the seconds of each of their
alternating steps, and the host. Measurements of different devices, resolutions or batches stand in rows of their own.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from kalmannorm.errors import UserError
from kalmannorm.experiments.measurement import FOLDER, Measurement, measured_part, where
from kalmannorm.report import caption, paper
from kalmannorm.report.read import Records
from kalmannorm.report.render import Sheet, Text
from kalmannorm.report.statistics import middle_half
from kalmannorm.report.table import mark, suffix

Card = Mapping[str, Any]


def read(results: Path, card: Card) -> list[Measurement]:
    """The measurements of a card, the largest input first. UserError: a file that is not a whole measurement."""
    keys = {row["key"] for row in card["rows"]}
    found = []
    for path in sorted((results / FOLDER).glob("*.json")):
        if path.name.startswith("."):
            continue  # not renamed to its final name yet
        try:
            measurement = json.loads(path.read_text())
            if measurement["id"] != path.stem or not keys <= measurement["configs"].keys():
                raise ValueError
            pairs = [measurement["seconds"][key] for key in keys]
            if len({len(seconds) for seconds in pairs}) != 1 or not all(s > 0 for seconds in pairs for s in seconds):
                raise ValueError
            where(measurement), setting(measurement["configs"][card["baseline"]])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{path} is not a whole measurement: move it away, or delete it to measure again") from None
        if measurement["experiment"] == card["name"]:
            found.append(measurement)
    return sorted(found, key=lambda m: _order(m, card), reverse=True)


def sheet(card: Card, found: Records) -> Sheet:
    """A row for every measurement, one for the card's own setting where it was not measured, the paper's last."""
    if len(card["rows"]) != 2:
        raise UserError(f"{card['name']} compares two rows, this is {card['rows'][0]['key']} alone: leave out rows=")
    base, other = sorted(card["rows"], key=lambda row: row["key"] != card["baseline"])
    measurements = read(found.folder, card)
    notes = [_note(measurement, other["key"]) for measurement in measurements]
    rows = [
        [Text(where(m), mark(i)), Text(setting(m["configs"][base["key"]])), *_values(m, base["key"], other["key"])]
        for i, m in enumerate(measurements)
    ]
    own = {row["key"]: measured_part(row["config"], False) for row in (base, other)}
    missing = not any(all(_input(m["configs"][key]) == _input(own[key]) for key in own) for m in measurements)
    if missing:
        rows.append([Text("any device"), Text(_input_in_words(own[base["key"]])), *[Text("not run")] * 3, Text("0")])
    printed = [paper.value(f"{card['paper']}.{row['key']}") for row in (base, other)]
    ratio = paper.value(card["paper_ratio"])
    papers = [_printed(value) for value in (*printed, ratio)]
    rows.append([Text(f"paper ({card['paper_setting']})"), Text("not printed"), *papers, Text("")])

    names = " and ".join(caption.distinct([row["config"] for row in card["rows"]], "arch", "name"))
    said = (
        f"Training steps (forward, backward, SGD) of {names} on synthetic images, on one device, without loading of "
        "data; both networks take turns step by step in one process, n times each. Examples per second: from the "
        f"median time of a step. Ratio: {base['label']}'s speed over {other['label']}'s, the median over neighbouring "
        "steps; in brackets the middle half. (grad, stat): images per step and images per set of statistics."
    )
    below = ["The paper's row: printed values, of another machine than any measured here.", str(card["note"])]
    if missing:
        below += ["Not run: the setting of this table's card. To run it:", str(card["command"])]
    header = ("device", "setting", f"{base['label']}, examples/s", f"{other['label']}, examples/s", "ratio", "n")
    records = [
        _record(row, (m["configs"] if m else own)[row["key"]], value, m, base["key"])
        for m in (*measurements, *([None] if missing else []))
        for row, value in zip((base, other), printed, strict=True)
    ]
    stem = "_".join([card["name"], *suffix(card)])
    return Sheet(stem, card["title"], said, header, 2, rows, tuple(notes), tuple(below), tuple(records))


def setting(config: Card) -> str:
    """Resolution, batches and arithmetic: "64x64 px, (32, 32), fp32, eager"."""
    return f"{_input_in_words(config)}, {config['precision']}, {'compiled' if config['compile'] else 'eager'}"


def _input_in_words(config: Card) -> str:
    width = config["arch"].get("width", 1)
    narrow = f", width {width:g}" if width != 1 else ""
    return f"{config['size']}x{config['size']} px, {caption.pair(caption.batches(config))}{narrow}"


def _input(config: Card) -> dict[str, Any]:
    """A configuration without what the device decides."""
    return {key: value for key, value in config.items() if key not in ("precision", "compile")}


def _order(measurement: Measurement, card: Card) -> tuple[Any, ...]:
    config = measurement["configs"][card["baseline"]]
    return config["size"], config["batch"]["grad_batch"], where(measurement), config["compile"], measurement["id"]


def ratios(measurement: Measurement, base: str, other: str) -> list[float]:
    """Speed of `base` over that of `other`, for each pair of neighbouring steps."""
    seconds = measurement["seconds"]
    return [slow / fast for fast, slow in zip(seconds[base], seconds[other], strict=True)]


def _rate(measurement: Measurement, key: str) -> float:
    """Examples per second."""
    return float(measurement["configs"][key]["batch"]["grad_batch"] / median(measurement["seconds"][key]))


def _values(measurement: Measurement, base: str, other: str) -> list[Text]:
    found = ratios(measurement, base, other)
    low, high = middle_half(found)
    rates = [Text(f"{_rate(measurement, key):.2f}") for key in (base, other)]
    return [*rates, Text(f"{median(found):.3f} [{low:.3f}, {high:.3f}]"), Text(str(len(found)))]


def _printed(value: float | None) -> Text:
    return Text("–" if value is None else f"{value}")


def _note(measurement: Measurement, kalman: str) -> str:
    host, norm = measurement["host"], measurement["configs"][kalman]["norm"]
    git = host["git"]
    commit = f"commit {(git['commit'] or 'unknown')[:10]}{', with changes' if git['dirty'] else ''}"
    how = f"KN: {caption.estimator(norm)}. " if norm.get("preset") else ""
    return f"{how}Measured {host['started'][:10]}, {commit}, torch {host['versions']['torch']} ({measurement['id']})."


def _record(
    row: Card, config: Card, printed: float | None, measurement: Measurement | None, base: str
) -> dict[str, object]:
    """A line of the CSV; without a measurement: not run."""
    host = measurement["host"] if measurement else {}
    seconds = measurement["seconds"][row["key"]] if measurement else []
    low, high = middle_half(seconds) if seconds else (None, None)
    found = ratios(measurement, base, row["key"]) if measurement else []
    ratio_low, ratio_high = middle_half(found) if found else (None, None)
    return {
        "row": row["key"],
        "state": "done" if measurement else "not run",
        "examples_per_s": _number(_rate(measurement, row["key"]) if measurement else None),
        "seconds_per_step": _number(median(seconds) if seconds else None),
        "seconds_low": _number(low),
        "seconds_high": _number(high),
        "seconds_over_base": _number(median(found) if found else None),
        "seconds_over_base_low": _number(ratio_low),
        "seconds_over_base_high": _number(ratio_high),
        "n": len(seconds),
        "paper_examples_per_s": "" if printed is None else printed,
        "network": config["arch"]["name"],
        "width": config["arch"].get("width", ""),
        "normalizer": config["norm"]["name"],
        "size": config["size"],
        "classes": config["classes"],
        "grad_batch": config["batch"]["grad_batch"],
        "stat_batch": config["batch"]["stat_batch"],
        "precision": config["precision"] if measurement else "",
        "compile": config["compile"] if measurement else "",
        "device": host.get("device", ""),
        "hardware": host.get("hardware", ""),
        "threads": host.get("threads", ""),
        "started": host.get("started", ""),
        "commit": host["git"]["commit"] if host else "",
        "dirty": host["git"]["dirty"] if host else "",
        "torch": host["versions"]["torch"] if host else "",
        "measurement": measurement["id"] if measurement else "",
    }


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"
