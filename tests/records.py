"""Records for the tests of the report, in the layout that runs write."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kalmannorm.experiments.record import NUMERICS, _hash
from kalmannorm.presets import BATCH_STATISTICS, KALMAN, PRESETS, preset_options
from kalmannorm.report import frame

BINS, CHANNELS, LAYERS = 24, 40, 19


def config(
    norm: str = "bn",
    stat_batch: int | None = 2,
    *,
    dataset: str = "cifar10",
    budget: str = "lite",
    arch: str = "inception_cifar",
    preset: str = "paper",
    **options: Any,
) -> dict[str, Any]:
    """A composed config without its seed, of rows that cards have."""
    parts = frame.resolved(dataset, budget, "released", arch)
    stat_batch = stat_batch if norm in BATCH_STATISTICS else None
    known = {k: v for k, v in (frame.norm_defaults(norm).get("options") or {}).items() if v is not None}
    chosen: dict[str, Any] = {"name": norm, "preset": None, "predictor": None, "options": {**known, **options}}
    if norm in KALMAN:
        given = preset_options(preset, norm, stat_batch, chosen["options"])
        chosen |= {"preset": preset, "predictor": PRESETS[preset]["predictor"], "options": given}
    return {
        **json.loads(json.dumps(parts)),
        "norm": chosen,
        "batch": {"grad_batch": 128, "stat_batch": stat_batch},
        "precision": "fp32",
        "compile": False,
        "deterministic": False,
    }


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
    name: str | None = None,
    curves: Mapping[str, Any] | None = None,
    mixture: Sequence[float] = (),
    **changes: Any,
) -> str:
    """Write results/records/<id>.json (and .npz) of a run of the config `of`, and return its id.

    It ends with the accuracies of `curves`, where they are given.
    """
    determining = {**of, "seed": seed, **changes}
    identity = name or _hash(determining, numerics)
    record: dict[str, Any] = {
        "id": identity,
        "numerics": numerics,
        "status": "failed" if failed else "done",
        "reason": failed,
        "config": determining,
        "host": {"started": f"2026-01-0{seed % 9 + 1}T00:00:00", "seconds": 12.5, "device": "cpu"},
    }
    if not failed:
        curves = curves or {"epoch": [1, 2], "step": [11, 22], "moving": [moving / 2, moving], "online": [50.0, online]}
        final = {kind: {"accuracy": curves[kind][-1], "loss": 0.3, "images": 360} for kind in ("moving", "online")}
        order = [f"block{i // 6}.b{i % 6}.bn" for i in range(LAYERS)]
        gain = determining["norm"]["options"].get("gain")
        record |= {
            "parameters": 903_018,
            "curves": curves,
            "final": {**final, "precise": final["moving"]},
            "norms": {
                "gains": {} if gain is None else {name: min(1.0, gain + 0.01 * i) for i, name in enumerate(order)},
                "beliefs": {name: None if i else "the network's input" for i, name in enumerate(order)},
                "order": order,
                "last": ["block2.b5.bn", "block3.b0.bn"],
            },
            "data": {
                "name": determining["dataset"]["name"],
                "fidelity": "60,000 of 60,000 exact",
                "sha256": sha256,
                "train_images": 50_000,
            },
        }
        if mixture:
            record["norms"]["mixture"] = {name: {"mean": list(mixture), "var": list(mixture)} for name in order}
    folder = results / "records"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{identity}.json").write_text(json.dumps(record))
    if arrays:
        write_arrays(folder / f"{identity}.npz", seed, kalman=determining["norm"]["name"] == "bkn")
    return identity


def write_arrays(path: Path, seed: int, kalman: bool) -> None:
    """Variance gaps of a plausible size, a fraction of a moving variance that spreads over decades; layers' errors."""
    draw = np.random.default_rng(seed)
    moving = draw.lognormal(-1 if kalman else 0, 1.2, CHANNELS)
    spread = draw.uniform(0.3, 0.7, CHANNELS)[:, None] * draw.gamma(20, 1 / 20, (CHANNELS, BINS))
    layers = np.linspace(0.15, 0.55, LAYERS) * draw.uniform(0.9, 1.1, LAYERS)
    arrays = {"gap_measured": spread * moving[:, None], "moving_var": moving, "layer_gap_measured": layers}
    if kalman:
        arrays |= {"gap_used": arrays["gap_measured"] * 0.5, "layer_gap_used": layers * 0.5}
    for moment in ("mean", "var"):
        bias, noise = np.array([[0.01], [0.5], [0.2]]) * layers, np.array([[0.4], [0.1], [0.2]]) * layers
        for part, values in (("", np.hypot(bias, noise)), ("_bias", bias), ("_spread", noise)):
            values[1, 0] = np.nan  # the first layer has no prior
            if not kalman:
                values[1], values[2] = np.nan, values[0]
            arrays[f"layer_error_{moment}{part}"] = values
    half = CHANNELS // 2
    last = np.array([half, CHANNELS - half])
    np.savez(path, last_channels=last, **{key: value.astype(np.float32) for key, value in arrays.items()})


def table7(results: Path, seeds: int = 3, **changes: Any) -> None:
    """BN and KN of Table 7, KN two points ahead when it learned; BN at 128 without spread to speak of."""
    for seed in range(1, seeds + 1):
        write_record(results, config("bn"), seed, 60 + 0.1 * seed, 59.0, arrays=True, **changes)
        write_record(results, config("bn", 128), seed, 66 + 0.1 * seed, 64.0 + 0.2 * (seed % 2), arrays=True, **changes)
        write_record(results, config("bkn"), seed, 62 + 0.1 * seed, 62 + 0.1 * seed, arrays=True, **changes)
