"""Table 3: training speed of two networks, from the measurements in results/speed/ and from nothing else.

A measurement (runs/speed.py makes it) is one JSON file: both rows' configurations, the seconds of each of their
alternating steps, and the host. Measurements of different devices, resolutions or batches stand in rows of their own.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from kalmannorm.errors import UserError
from kalmannorm.report import caption, paper
from kalmannorm.report.read import Records
from kalmannorm.report.render import Sheet, Text
from kalmannorm.report.statistics import middle_half
from kalmannorm.report.table import mark

Card = Mapping[str, Any]
Measurement = dict[str, Any]
FOLDER = "speed"  # in the results folder


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


def measured_part(config: Card, compiled: bool) -> dict[str, Any]:
    """What of a run's configuration its speed depends on."""
    return {
        **{key: config[key] for key in ("arch", "norm", "batch", "precision")},
        "compile": compiled,
        "size": config["budget"]["size"],
        "classes": config["dataset"]["classes"],
    }


def sheet(card: Card, found: Records) -> Sheet:
    """A row for every measurement, one for the card's own setting where it was not measured, the paper's last."""
    base, other = sorted(card["rows"], key=lambda row: row["key"] != card["baseline"])
    measurements = read(found.folder, card)
    notes = [_note(measurement, other["key"]) for measurement in measurements]
    rows = [
        [Text(where(m), mark(i)), Text(setting(m["configs"][base["key"]])), *_values(m, base["key"], other["key"])]
        for i, m in enumerate(measurements)
    ]
    wanted = {row["key"]: _input(measured_part(row["config"], False)) for row in card["rows"]}
    missing = not any({key: _input(m["configs"][key]) for key in wanted} == wanted for m in measurements)
    if missing:
        own = measured_part(base["config"], False)
        rows.append([Text("any device"), Text(_input_in_words(own)), *[Text("not run")] * 3, Text("0")])
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
    below = ["The paper's row: printed values, of another machine than any measured here."]
    if missing:
        below += ["Not run: the setting of this table's card. To run it:", str(card["command"])]
    header = ("device", "setting", f"{base['label']}, examples/s", f"{other['label']}, examples/s", "ratio", "n")
    records = tuple(_record(m, row["key"], printed[i]) for m in measurements for i, row in enumerate((base, other)))
    return Sheet(card["name"], card["title"], said, header, 2, rows, tuple(notes), tuple(below), records)


def where(measurement: Measurement) -> str:
    """The device, in words."""
    host = measurement["host"]
    threads = f", {host['threads']} thread{'s' if host['threads'] != 1 else ''}"
    return str(host["hardware"]) + ("" if host["device"].startswith("cuda") else threads)


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


def _ratios(measurement: Measurement, base: str, other: str) -> list[float]:
    """Speed of `base` over that of `other`, for each pair of neighbouring steps."""
    seconds = measurement["seconds"]
    return [slow / fast for fast, slow in zip(seconds[base], seconds[other], strict=True)]


def _rate(measurement: Measurement, key: str) -> float:
    """Examples per second."""
    return float(measurement["configs"][key]["batch"]["grad_batch"] / median(measurement["seconds"][key]))


def _values(measurement: Measurement, base: str, other: str) -> list[Text]:
    ratios = _ratios(measurement, base, other)
    low, high = middle_half(ratios)
    rates = [Text(f"{_rate(measurement, key):.2f}") for key in (base, other)]
    return [*rates, Text(f"{median(ratios):.3f} [{low:.3f}, {high:.3f}]"), Text(str(len(ratios)))]


def _printed(value: float | None) -> Text:
    return Text("–" if value is None else f"{value}")


def _note(measurement: Measurement, kalman: str) -> str:
    host, norm = measurement["host"], measurement["configs"][kalman]["norm"]
    git = host["git"]
    commit = f"commit {(git['commit'] or 'unknown')[:10]}{', with changes' if git['dirty'] else ''}"
    how = f"KN: {caption.estimator(norm)}. " if norm.get("preset") else ""
    return f"{how}Measured {host['started'][:10]}, {commit}, torch {host['versions']['torch']} ({measurement['id']})."


def _record(measurement: Measurement, key: str, printed: float | None) -> dict[str, object]:
    config, host, seconds = measurement["configs"][key], measurement["host"], measurement["seconds"][key]
    low, high = middle_half(seconds)
    return {
        "measurement": measurement["id"],
        "row": key,
        "network": config["arch"]["name"],
        "normalizer": config["norm"]["name"],
        "device": host["device"],
        "hardware": host["hardware"],
        "threads": host["threads"],
        "size": config["size"],
        "classes": config["classes"],
        "grad_batch": config["batch"]["grad_batch"],
        "stat_batch": config["batch"]["stat_batch"],
        "precision": config["precision"],
        "compile": config["compile"],
        "examples_per_s": f"{_rate(measurement, key):.6g}",
        "seconds_per_step": f"{median(seconds):.6g}",
        "seconds_low": f"{low:.6g}",
        "seconds_high": f"{high:.6g}",
        "n": len(seconds),
        "paper_examples_per_s": "" if printed is None else printed,
        "started": host["started"],
        "commit": host["git"]["commit"],
        "dirty": host["git"]["dirty"],
        "torch": host["versions"]["torch"],
    }
