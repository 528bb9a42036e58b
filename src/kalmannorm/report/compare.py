"""Two runs beside each other: what differs in their configurations, how they ended, how their curves end."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kalmannorm.experiments.record import Record, find
from kalmannorm.report import sheet as sheets
from kalmannorm.report.frame import flat

EPOCHS = 3  # last epochs of the curves that are shown
FINALS = ("accuracy", "loss", "box_ap", "mask_ap", "miou", "pixel_accuracy")
HOST = ("started", "hardware", "device", "threads", "images_per_s", "seconds")


def compare(results: Path, first: str, second: str) -> str:
    """Return the comparison as text. Each run is an id or its beginning. Raises UserError: no such run, or several."""
    runs = [find(results, run) for run in (first, second)]
    statuses = [{"status": _status(run)} for run in runs]
    numerics = [{"NUMERICS": str(run["numerics"])} for run in runs]
    configs = [flat(run["config"], "") for run in runs]
    lines = [["", *(run["id"] for run in runs)], *_beside(statuses), *_differing(numerics)]
    lines += [["configuration, where it differs"], *(_differing(configs) or [["", "the same", "the same"]])]
    lines += [["result"], *_beside([_results(run) for run in runs])]
    lines += [["curves, the last epochs"], *_beside([_curves(run) for run in runs])]
    lines += [["data and host, where they differ"], *_differing([_around(run) for run in runs])]
    headings = ["" if len(line) > 1 else f"\n{line[0]}" for line in lines]
    rows = sheets.aligned([line if len(line) > 1 else [""] for line in lines])
    return "\n".join(heading or f"  {row}" for heading, row in zip(headings, rows, strict=True))


def _status(run: Record) -> str:
    return f"{run['status']} ({' '.join(str(run['reason']).split())})" if run.get("reason") else run["status"]


def _results(run: Record) -> dict[str, Any]:
    final = {**(run.get("final") or {}), "training images:": run.get("final_on_training_images") or {}}
    values = {f"{kind} {key}": of.get(key) for kind, of in final.items() for key in FINALS}
    return {key: value for key, value in values.items() if value is not None} | {"parameters": run.get("parameters")}


def _curves(run: Record) -> dict[str, str]:
    curves = run.get("curves") or {}
    shown = ("moving", "online", "train_loss", *(key for key in curves if key.startswith("loss_")))
    ends = {key: "  ".join(map(_written, curves[key][-EPOCHS:])) for key in shown if curves.get(key)}
    return {"epochs": str(len(curves.get("epoch") or [])), **ends}


def _around(run: Record) -> dict[str, Any]:
    host = run.get("host") or {}
    kept = {key: host.get(key) for key in HOST} | {"versions": host.get("versions") or {}, "git": host.get("git") or {}}
    return flat(kept, "host.") | flat(run.get("data") or {}, "data.")


def _beside(trees: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return a line for each key of two dicts: both values and, if they are numbers, their difference."""
    lines = []
    for key in dict.fromkeys(key for tree in trees for key in tree):
        values = [tree.get(key) for tree in trees]
        numbers = [value for value in values if isinstance(value, int | float)]
        difference = [_written(numbers[1] - numbers[0], "+")] if len(numbers) == len(values) else []
        lines.append([key, *map(_written, values), *difference])
    return lines


def _differing(trees: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    keys = dict.fromkeys(key for tree in trees for key in tree if len({str(tree.get(key)) for tree in trees}) > 1)
    return [[key, *(str(tree.get(key, "–")) for tree in trees)] for key in keys]


def _written(value: object, sign: str = "") -> str:
    if isinstance(value, int | float):
        return f"{value:{sign},}" if isinstance(value, int) else f"{value:{sign}.4g}"
    return "–" if value is None else str(value)
