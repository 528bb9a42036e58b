"""Two runs beside each other: what differs in their configurations, how they ended, how their curves end."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kalmannorm.experiments.record import Record, find
from kalmannorm.report.frame import flat

EPOCHS = 3  # of the curves' ends
FINALS = ("accuracy", "loss", "box_ap", "mask_ap")
HOST = ("started", "hardware", "device", "threads", "images_per_s", "seconds")


def compare(results: Path, first: str, second: str) -> str:
    """Return the comparison as text. Each run is an id or its beginning. Raises UserError: no such run, or several."""
    runs = [find(results, run) for run in (first, second)]
    lines = [["", *(run["id"] for run in runs)], *_statuses(runs)]
    differing = _differing([flat(run["config"], "") for run in runs])
    lines += [["configuration, where it differs"], *(differing or [["", "the same", "the same"]])]
    lines += [["result"], *_finals(runs)]
    lines += [["curves, the last epochs"], *_curves(runs)]
    lines += [["data and host, where they differ"], *_differing([_around(run) for run in runs])]
    return _aligned(lines)


def _statuses(runs: Sequence[Record]) -> list[list[str]]:
    reasons = [f" ({' '.join(str(run['reason']).split())})" if run.get("reason") else "" for run in runs]
    lines = [["status", *(f"{run['status']}{why}" for run, why in zip(runs, reasons, strict=True))]]
    numerics = [str(run["numerics"]) for run in runs]
    return lines if numerics[0] == numerics[1] else [*lines, ["NUMERICS", *numerics]]


def _finals(runs: Sequence[Record]) -> list[list[str]]:
    lines = []
    finals = [dict(run.get("final") or {}) for run in runs]
    for final, run in zip(finals, runs, strict=True):
        if seen := run.get("final_on_training_images"):  # a detector's
            final["training images:"] = seen
    for kind in dict.fromkeys(kind for final in finals for kind in final):
        for key in FINALS:
            values = [final.get(kind, {}).get(key) for final in finals]
            if values == [None] * len(values):
                continue  # classifiers and detectors have different ones
            lines.append([f"{kind} {key}", *map(_number, values), _difference(values)])
    counts = [run.get("parameters") for run in runs]
    return [*lines, ["parameters", *(_number(count, "{:,}") for count in counts), _difference(counts, "{:+,}")]]


def _curves(runs: Sequence[Record]) -> list[list[str]]:
    lines = []
    curves = [run.get("curves") or {} for run in runs]
    losses = [key for key in dict.fromkeys(key for curve in curves for key in curve) if key.startswith("loss_")]
    for key in ("moving", "online", "train_loss", *losses):
        if not any(curve.get(key) for curve in curves):
            continue
        ends = ["  ".join(_number(value) for value in (curve.get(key) or [])[-EPOCHS:]) or "–" for curve in curves]
        lines.append([key, *ends])
    return [["epochs", *(str(len(curve.get("epoch") or [])) for curve in curves)], *lines]


def _around(run: Record) -> dict[str, Any]:
    host = run.get("host") or {}
    kept = {f"host.{key}": host.get(key) for key in HOST}
    kept |= flat({"versions": host.get("versions") or {}, "git": host.get("git") or {}}, "host.")
    return kept | flat(run.get("data") or {}, "data.")


def _differing(trees: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    keys = dict.fromkeys(key for tree in trees for key in tree)
    return [
        [key, *(str(tree.get(key, "–")) for tree in trees)] for key in keys if trees[0].get(key) != trees[1].get(key)
    ]


def _number(value: object, form: str = "{:.4g}") -> str:
    return form.format(value) if isinstance(value, int | float) else "–"


def _difference(values: Sequence[Any], form: str = "{:+.4g}") -> str:
    return form.format(values[1] - values[0]) if all(isinstance(value, int | float) for value in values) else ""


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    """Headings (lines of one place) stand alone, the others in columns."""
    rows = [line for line in lines if len(line) > 1]
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows)))]
    return "\n".join(
        f"\n{line[0]}"
        if len(line) == 1
        else "  " + "  ".join(place.ljust(width) for place, width in zip(line, widths, strict=False)).rstrip()
        for line in lines
    )
