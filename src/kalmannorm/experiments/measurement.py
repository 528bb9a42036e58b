"""A measurement of training speed: one JSON file in results/speed, as runs/measure_speed.py writes it."""

from typing import TypedDict

from kalmannorm.experiments.record import Tree
from kalmannorm.machine import Host

FOLDER = "speed"  # in the results folder


class Measurement(TypedDict):
    """The steps of two rows of a card, which took turns."""

    id: str
    experiment: str  # the card's name
    configs: dict[str, Tree]  # by row: `measured_part`
    seconds: dict[str, list[float]]  # by row, of each step
    host: Host


def measured_part(config: Tree, compiled: bool) -> Tree:
    """Return what of a run's configuration its speed depends on."""
    return {
        **{key: config[key] for key in ("arch", "norm", "batch", "precision")},
        "compile": compiled,
        "size": config["budget"]["size"],
        "classes": config["dataset"]["classes"],
    }


def where(host: Host) -> str:
    """Say the device in words."""
    threads = f", {host['threads']} thread{'s' if host['threads'] != 1 else ''}"
    return str(host["hardware"]) + ("" if host["device"].startswith("cuda") else threads)
