"""Define the format of a speed measurement: a JSON file in results/speed, written by runs/measure_speed.py."""

from typing import TypedDict

from kalmannorm.experiments.record import Tree
from kalmannorm.machine import Host

FOLDER = "speed"  # in the results folder


class Measurement(TypedDict):
    """Times of the steps of two rows of a card, run alternately."""

    id: str
    experiment: str  # the card's name
    configs: dict[str, Tree]  # row -> measured_part
    seconds: dict[str, list[float]]  # row -> time of each step
    host: Host


def measured_part(config: Tree, compiled: bool) -> Tree:
    """Return the settings of a run on which its speed depends."""
    return {
        **{key: config[key] for key in ("arch", "norm", "batch", "precision")},
        "compile": compiled,
        "size": config["budget"]["size"],
        "classes": config["dataset"]["classes"],
    }


def where(host: Host) -> str:
    """Return the name of the device; on a CPU with the number of threads."""
    threads = f", {host['threads']} thread{'s' if host['threads'] != 1 else ''}"
    return str(host["hardware"]) + ("" if host["device"].startswith("cuda") else threads)
