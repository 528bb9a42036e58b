"""What the runs of a card cost, by the time of recorded runs like them; "not measured" where there is none."""

from typing import Any

from kalmannorm.experiments.predict import predictor
from kalmannorm.report.quantities import machine_name
from kalmannorm.report.read import Record, Records
from kalmannorm.report.table import Card, configs_of


def device_hours(card: Card, records: Records) -> dict[str, tuple[float, int]]:
    """By machine: hours of training and evaluation of the card's rows at the card's number of seeds, and how many rows
    that counts: those of which a run like them was recorded on that machine (runs/predict.py says how like)."""
    machines: dict[str, list[Record]] = {}
    for run in records.current:
        machines.setdefault(machine_name(run), []).append(run)
    hours = {}
    for machine, runs in machines.items():
        predict = predictor(runs)
        predicted = [predict(config) for config in _distinct(card)]
        if known := [seconds for seconds in predicted if seconds is not None]:
            hours[machine] = int(card.get("seeds", 1)) * sum(known) / 3600, len(known)
    return hours


def describe(card: Card, records: Records) -> str:
    """In a sentence: "2.1 device-hours on x86_64, ..., 1 thread, fp32 (3 of 5 rows; 3 seeds)"; else "not measured"."""
    rows, seeds = len(_distinct(card)), int(card.get("seeds", 1))
    said = [
        f"{_hours(hours)} on {machine} ({counted} of {rows} rows, {seeds} seed{'s' if seeds > 1 else ''})"
        for machine, (hours, counted) in sorted(device_hours(card, records).items())
    ]
    return "; ".join(said) or "not measured"


def _distinct(card: Card) -> list[Any]:
    return list({str(config): config for config in configs_of(card)}.values())


def _hours(hours: float) -> str:
    return f"{hours:,.1f} device-hours" if hours >= 0.1 else f"{60 * hours:.1f} device-minutes"
