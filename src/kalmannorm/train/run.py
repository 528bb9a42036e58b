"""`kalmannorm train`, `evaluate` and `export`: train one run in this process, and use its weights later."""

import json
import sys
from pathlib import Path
from typing import Any, Literal

from kalmannorm import machine
from kalmannorm.errors import UserError
from kalmannorm.experiments import record as records
from kalmannorm.experiments.config import Config, compose
from kalmannorm.files import write_atomically
from kalmannorm.train import checkpoint, loop
from kalmannorm.train.ranks import Ranks
from kalmannorm.train.task import arithmetic

METADATA: tuple[Literal["id", "config", "final", "data"], ...] = ("id", "config", "final", "data")
PLACE = ("data", "runs", "results", "device", "workers")


def execute(config: Config) -> records.Record:
    """Train a run, say in one line how it ended, and return its record."""
    record = loop.run(config)
    if machine.launch().rank:
        return record
    file = records.path(config.results, record["id"])
    if record["status"] == "failed":
        print(f"{record['id']}: failed, {record['reason']}; {file}", file=sys.stderr)
    else:
        final = record["final"]
        shown = "  ".join(f"{kind} {records.headline(values)}" for kind, values in final.items())
        if "final_on_training_images" in record:
            shown += f"  training images {records.headline(record['final_on_training_images'])}"
        print(f"{record['id']}: {shown}  {record['host']['images_per_s']} images/s; {file}")
    return record


def evaluate(run: str, overrides: list[str]) -> dict[str, records.Evaluation]:
    """Evaluate the weights of a finished run again, under all kinds of statistics, and print the result.

    `run`: an id or the beginning of one. `overrides`: PLACE only, data=, runs=, results=, device=, workers=. UserError:
    no such run, several of them, no weights, or an override of a setting of the run.
    """
    record, config, weights = _finished(run, overrides)
    ranks = Ranks(config)
    task = loop.open_task(config, ranks)
    task.model.load_state_dict(weights)
    task.load()
    with arithmetic(config, ranks.device):
        final = task.evaluate_all()
    print(f"run {record['id']}: {task.provenance['name']}, {task.provenance['fidelity']}")
    for kind, values in final.items():
        print(f"  {kind:8} {records.headline(values)}  (record {records.headline(record['final'][kind])})")
    return final


def export(run: str, file: str, overrides: list[str]) -> Path:
    """Write the weights of a finished run as safetensors, with its id, configuration and final accuracies as metadata.

    They load into `convert(ARCHS[...](...), norm, ...)` of the same configuration. UserError: as evaluate; no
    permission, no space.
    """
    from safetensors.torch import save

    record, _, weights = _finished(run, overrides)
    metadata: dict[str, str] = {key: json.dumps(record[key], sort_keys=True) for key in METADATA}
    # Cloned, since safetensors refuses tensors that share memory, such as an R shared by all layers.
    write_atomically(Path(file), save({k: v.contiguous().clone() for k, v in weights.items()}, metadata))
    print(f"{file}: weights of run {record['id']}")
    return Path(file)


def _finished(run: str, overrides: list[str]) -> tuple[records.Record, Config, dict[str, Any]]:
    """Return record, configuration (with the overrides applied) and weights of a finished run. UserError: as
    evaluate."""
    if any(o.partition("=")[0] not in PLACE for o in overrides):
        places = ", ".join(f"{key}=" for key in PLACE)
        raise UserError(f"expected only {places} here: a run's settings are in its record")
    place = compose(overrides)
    record = records.find(place.results, run)
    if record["status"] != "done":
        raise UserError(f"run {record['id']} failed ({record['reason']}): there is nothing to evaluate")
    if record["numerics"] != records.NUMERICS:
        raise UserError(
            f"run {record['id']} was made by another version of the code (NUMERICS {record['numerics']}, this is "
            f"{records.NUMERICS}): train it again"
        )
    config = Config.read({**place.values(), **record["config"]})
    folder = Path(config.runs) / record["id"]
    state = checkpoint.load(folder, record["id"])
    if state is None:
        raise UserError(f"no weights of run {record['id']} in {folder}: pass runs=FOLDER, or train it")
    return record, config, state["model"]
