"""Records and cards for the tests of the report, in the layout that runs write."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kalmannorm import report
from kalmannorm.experiments.record import run_id
from kalmannorm.report.table import Row, Table, table

NUMERICS = 3
BINS, CHANNELS, LAYERS = 24, 40, 19


def config(norm: str = "bn", stat_batch: int | None = 2, **options: Any) -> dict[str, Any]:
    """A composed config without its seed."""
    kalman = norm in ("bkn", "gkn")
    chosen: dict[str, Any] = {"name": norm, "options": options}
    if kalman:
        chosen |= {"preset": "paper", "predictor": "closed", "options": {"gain": 0.5, **options}}
    return {
        "dataset": {"name": "digits", "classes": 10, "pad": 4, "flip": False},
        "arch": {"name": "inception_cifar", "width": 1.0},
        "norm": chosen,
        "batch": {"grad_batch": 128, "stat_batch": stat_batch},
        "schedule": {"name": "released", "lr": [[1, 0.01], [4, 0.1]], "momentum": 0.9, "weight_decay": 2e-4},
        "budget": {"name": "lite", "epochs": 4, "of_epochs": 400, "subset": None, "size": 16},
        "precision": "fp32",
        "compile": False,
        "deterministic": False,
    }


def card(**changes: Any) -> dict[str, Any]:
    """Table 7 with one row of ours."""
    rows = [
        {"key": "bn_stat2", "label": "BN", "ours": False, "config": config()},
        {"key": "bn_stat128", "label": "BN", "ours": False, "config": config(stat_batch=128)},
        {"key": "kn_stat2", "label": "KN", "ours": False, "config": config("bkn")},
        {"key": "kn_output", "label": "KN, belief=output", "ours": True, "config": config("bkn", belief="output")},
    ]
    return {
        "name": "table7",
        "title": "Table 7 of Kalman Normalization (NeurIPS 2018): moving and online statistics",
        "paper": "neurips.table7",
        "paper_dataset": "cifar10",
        "paper_setting": "CIFAR-10, small Inception",
        "baseline": "bn_stat2",
        "rows": rows,
        "columns": ["online", "moving"],
    } | changes


def figure_card(**changes: Any) -> dict[str, Any]:
    """Figure 5 over two rows of the table."""
    rows = [row for row in card()["rows"] if row["key"] in ("bn_stat2", "kn_stat2")]
    return {"name": "figure5", "kind": "figure", "title": "Figure 5", "rows": rows} | changes


def write_record(
    results: Path,
    of: Mapping[str, Any],
    seed: int,
    moving: float = 90.0,
    online: float = 91.0,
    *,
    numerics: int = NUMERICS,
    failed: str | None = None,
    sha256: str = "d" * 64,
    arrays: bool = False,
    errors: bool = False,
    name: str | None = None,
    curves: Mapping[str, Any] | None = None,
    **changes: Any,
) -> str:
    """Write results/records/<id>.json (and .npz) of a run of the config `of`, and return its id.

    It ends with the accuracies of `curves`, where they are given.
    """
    determining = {**of, "seed": seed, **changes}
    identity = name or run_id(determining, numerics)
    record: dict[str, Any] = {
        "id": identity,
        "numerics": numerics,
        "status": "failed" if failed else "done",
        "reason": failed,
        "config": determining,
        "host": {"started": f"2026-01-0{seed % 9 + 1}T00:00:00", "seconds": 12.5, "device": "cpu"},
    }
    if not failed:
        curves = curves or {"epoch": [1, 2], "step": [11, 22], "moving": [50.0, moving], "online": [50.0, online]}
        final = {kind: {"accuracy": curves[kind][-1], "loss": 0.3, "images": 360} for kind in ("moving", "online")}
        order = [f"block{i // 6}.b{i % 6}.bn" for i in range(LAYERS)]
        gain = determining["norm"]["options"].get("gain")
        record |= {
            "parameters": 903_018 + (1_600 if determining["norm"]["name"] == "bkn" else 0),
            "curves": curves,
            "final": {**final, "precise": final["moving"]},
            "norms": {
                "gains": {} if gain is None else {name: gain + 0.01 * i for i, name in enumerate(order)},
                "beliefs": {name: None if i else "the network's input" for i, name in enumerate(order)},
                "order": order,
                "last": ["block2.b5.bn", "block3.b0.bn"],
            },
            "data": {
                "name": determining["dataset"]["name"],
                "fidelity": "1,797 of 1,797 exact",
                "sha256": sha256,
                "train_images": 1437,
            },
        }
    folder = results / "records"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{identity}.json").write_text(json.dumps(record))
    if arrays or errors:
        write_arrays(folder / f"{identity}.npz", seed, kalman=determining["norm"]["name"] == "bkn", errors=errors)
    return identity


def write_arrays(path: Path, seed: int, kalman: bool, errors: bool = False) -> None:
    """Variance gaps of a plausible size: a fraction of a moving variance that spreads over decades."""
    draw = np.random.default_rng(seed)
    moving = draw.lognormal(-1 if kalman else 0, 1.2, CHANNELS)
    spread = draw.uniform(0.3, 0.7, CHANNELS)[:, None] * draw.gamma(20, 1 / 20, (CHANNELS, BINS))
    layers = np.linspace(0.15, 0.55, LAYERS) * draw.uniform(0.9, 1.1, LAYERS)
    arrays = {"gap_measured": spread * moving[:, None], "moving_var": moving, "layer_gap_measured": layers}
    if kalman:
        arrays |= {"gap_used": arrays["gap_measured"] * 0.5, "layer_gap_used": layers * 0.5}
    if errors:
        for moment in ("mean", "var"):
            bias, spread = np.array([[0.01], [0.5], [0.2]]) * layers, np.array([[0.4], [0.1], [0.2]]) * layers
            for part, values in (("", np.hypot(bias, spread)), ("_bias", bias), ("_spread", spread)):
                values[1, 0] = np.nan  # the first layer has no prior
                if not kalman:
                    values[1], values[2] = np.nan, values[0]
                arrays[f"layer_error_{moment}{part}"] = values
    half = CHANNELS // 2
    last = np.array([half, CHANNELS - half])
    np.savez(path, last_channels=last, **{key: value.astype(np.float32) for key, value in arrays.items()})


def made(results: Path, **changes: object) -> Table:
    return table(card(**changes), report.records(results, NUMERICS))


def full(results: Path) -> Table:
    """A table of three seeds per row of the paper's, one of ours."""
    *papers, ours = (row["config"] for row in card()["rows"])
    for place, row in enumerate(papers):
        for seed in (1, 2, 3):
            value = 90.0 + 2 * place + 0.1 * seed * (1 + place)
            write_record(results, row, seed, moving=value, online=90.0 + (seed * 7 % 3 - 1) * (1 + place), arrays=True)
    write_record(results, ours, 1, moving=95.0, arrays=True)
    return made(results)


def row_of(found: Table, key: str) -> Row:
    return next(row for row in found.rows if row.key == key)


def notes_of(found: Table, key: str) -> str:
    return "; ".join(row_of(found, key).cells[0].notes)
