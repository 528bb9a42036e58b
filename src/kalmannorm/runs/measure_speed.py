"""Measure training speed for a card of kind "speed" (Table 3): its two rows take turns step by step."""

import hashlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from kalmannorm import machine
from kalmannorm.errors import UserError
from kalmannorm.experiments.card import Card
from kalmannorm.experiments.cards import Experiment
from kalmannorm.experiments.config import Config, batches
from kalmannorm.experiments.measurement import FOLDER, Measurement, measured_part, where
from kalmannorm.experiments.record import Tree
from kalmannorm.files import write_atomically

if TYPE_CHECKING:
    import torch


def measure(experiment: Experiment, dry_run: bool = False) -> int:
    """Make the missing measurements, eager and, if the configuration compiles (on a GPU), compiled. Return 0.

    There is one measurement for each setting and kind of hardware; delete its file to measure again. UserError: the
    card does not have two rows; the device does not exist, or has too little memory.
    """
    import torch

    from kalmannorm.train.ranks import Ranks

    card = experiment.card
    configs = dict(zip(experiment.keys, experiment.runs, strict=True))
    if len(configs) != 2 or card.baseline is None or card.baseline not in configs:
        raise UserError(f"{card.name} compares two rows, {card.baseline} and another: found {', '.join(configs)}")
    baseline = configs[card.baseline]
    device = Ranks(baseline).device
    host = machine.host(str(device))
    print(f"{card.name}: {card.title}", file=sys.stderr)
    for compiled in (False, True) if baseline.compile else (False,):
        parts = {key: measured_part(config.result(), compiled) for key, config in configs.items()}
        identity = _identity(card.name, parts, host)
        file = Path(baseline.results) / FOLDER / f"{identity}.json"
        words = f"{baseline.budget.size} px, {batches(baseline.result())}, {'compiled' if compiled else 'eager'}"
        state = "done" if file.exists() else f"to measure, {card.seconds} s and more"
        print(f"  {identity}  {words}, {where(host)}  {state}", file=sys.stderr)
        if file.exists() or dry_run:
            continue
        try:
            seconds = _alternate(configs, card, device, compiled)
        except torch.OutOfMemoryError:
            raise UserError(f"{card.name}: {device} has too little memory for this: pass a smaller batch.grad_batch"
                            " (a multiple of batch.stat_batch) or budget.size") from None  # fmt: skip
        measurement: Measurement = {
            "id": identity,
            "experiment": card.name,
            "configs": parts,
            "seconds": seconds,
            "host": host,
        }
        text = json.dumps(measurement, indent=1, sort_keys=True, allow_nan=False)
        write_atomically(file, f"{text}\n".encode())
    return 0


def _identity(name: str, parts: dict[str, Tree], host: machine.Host) -> str:
    """Return a hash of the setting and the hardware, 12 hexadecimal digits."""
    of = {"experiment": name, "configs": parts, "where": where(host)}
    return hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:12]


def _alternate(
    configs: dict[str, Config], card: Card, device: "torch.device", compiled: bool
) -> dict[str, list[float]]:
    """Measure the rows' training steps in turn. Return the seconds of each step, by row."""
    from kalmannorm.train.model import build
    from kalmannorm.train.timed_steps import alternate, synthetic_batch, training_step

    steps = {}
    for key, config in configs.items():
        batch = synthetic_batch(config.batch.grad_batch, config.budget.size, config.dataset.classes)
        model, _ = build(config)
        steps[key] = training_step(model, device, batch, compiled=compiled, precision=config.precision)
    other = next(key for key in configs if key != card.baseline)
    base = str(card.baseline)
    pairs = alternate(steps[other], steps[base], card.seconds, device)
    return {other: [round(ours, 6) for ours, _ in pairs], base: [round(theirs, 6) for _, theirs in pairs]}
