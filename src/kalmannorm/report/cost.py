"""What the runs of a card cost, from the speed of recorded runs like them; "not measured" where there is none."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from kalmannorm.report.quantities import machine_name
from kalmannorm.report.read import Record, Records
from kalmannorm.report.table import Card, configs_of

Config = Mapping[str, Any]


def device_hours(card: Card, records: Records) -> dict[str, tuple[float, int]]:
    """By machine: hours of training of the card's rows at the card's number of seeds, and how many rows that counts.

    Training alone, epochs x images / (images a second): evaluations come on top. A row without a recorded run of the
    same network, normalizer and resolution on a machine is not counted there.
    """
    hours: dict[str, tuple[float, int]] = {}
    seeds = int(card.get("seeds", 1))
    distinct = {str(config): config for config in configs_of(card)}.values()
    for config in distinct:
        for machine, runs in _alike(config, records).items():
            images = _images(config, runs)
            if images:
                speed = median(run["host"]["images_per_s"] for run in runs)
                spent, rows = hours.get(machine, (0.0, 0))
                hours[machine] = (spent + seeds * config["budget"]["epochs"] * images / speed / 3600, rows + 1)
    return hours


def describe(card: Card, records: Records) -> str:
    """In a sentence: "2.1 device-hours on x86_64, ..., 1 thread, fp32 (3 of 5 rows; 3 seeds)"; else "not measured"."""
    rows = len({str(config) for config in configs_of(card)})
    seeds = int(card.get("seeds", 1))
    said = [
        f"{_hours(hours)} on {machine} ({counted} of {rows} rows, {seeds} seed{'s' if seeds > 1 else ''})"
        for machine, (hours, counted) in sorted(device_hours(card, records).items())
    ]
    return "; ".join(said) or "not measured"


def _alike(config: Config, records: Records) -> dict[str, list[Record]]:
    """Done runs of the same network, normalizer and resolution that recorded a speed, by machine."""
    found: dict[str, list[Record]] = {}
    for run in records.current:
        other = run["config"]
        same = all(other[part] == config[part] for part in ("arch", "norm", "batch"))
        same = same and other["budget"].get("size") == config["budget"].get("size")
        if same and run["status"] == "done" and (run.get("host") or {}).get("images_per_s"):
            found.setdefault(machine_name(run), []).append(run)
    return found


def _images(config: Config, runs: Sequence[Record]) -> int | None:
    """Training images of an epoch: the budget's subset, else what runs on the whole of the same data recorded."""
    if config["budget"].get("subset"):
        return int(config["budget"]["subset"])
    for run in runs:
        other = run["config"]
        if other["dataset"]["name"] == config["dataset"]["name"] and not other["budget"].get("subset"):
            return (run.get("data") or {}).get("train_images")
    return None


def _hours(hours: float) -> str:
    return f"{hours:,.1f} device-hours" if hours >= 0.1 else f"{60 * hours:.1f} device-minutes"
