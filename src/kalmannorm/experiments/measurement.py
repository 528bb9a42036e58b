"""A measurement of training speed: one JSON file in results/speed, as runs/measure_speed.py writes it."""

from collections.abc import Mapping
from typing import Any

Measurement = dict[str, Any]
FOLDER = "speed"  # in the results folder


def measured_part(config: Mapping[str, Any], compiled: bool) -> dict[str, Any]:
    """Return what of a run's configuration its speed depends on."""
    return {
        **{key: config[key] for key in ("arch", "norm", "batch", "precision")},
        "compile": compiled,
        "size": config["budget"]["size"],
        "classes": config["dataset"]["classes"],
    }


def where(measurement: Measurement) -> str:
    """Say the device in words."""
    host = measurement["host"]
    threads = f", {host['threads']} thread{'s' if host['threads'] != 1 else ''}"
    return str(host["hardware"]) + ("" if host["device"].startswith("cuda") else threads)
