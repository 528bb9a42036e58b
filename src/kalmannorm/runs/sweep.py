"""A sweep: what an experiment asks for, less what is done. A report: its table or figure from the records."""

import sys
from pathlib import Path
from typing import Any

from kalmannorm.errors import Stopped, UserError
from kalmannorm.report import read
from kalmannorm.runs import record as records
from kalmannorm.runs.config import Config, result_part
from kalmannorm.runs.experiment import Experiment, load


def sweep(name: str, arguments: list[str], dry_run: bool = False) -> int:
    """Runs what is missing and goes on past failures; 1 if a run failed."""
    experiment = load(name, arguments)
    if experiment.card.get("kind") == "pending":
        raise UserError(f"{name} cannot be run: {experiment.card['reason']}")
    results = experiment.runs[0]["results"]
    found = read.records(Path(results), records.NUMERICS)
    done = {record["id"] for record in found.current if record["status"] == "done"}
    missing = [config for config in experiment.runs if records.run_id(config) not in done]
    _announce(experiment, missing, found)
    if dry_run or not missing:
        return 0

    from kalmannorm.runs.execute import execute

    failed: list[str] = []
    for number, config in enumerate(missing, 1):
        print(f"[{number}/{len(missing)}] {_describe(config)}", file=sys.stderr)
        identity = records.run_id(config)
        try:
            record = execute(config)
        except (UserError, Stopped):
            raise  # configuration, data or disk: every other run would meet the same; or a signal
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            record = {"id": identity, "numerics": records.NUMERICS, "status": "failed", "reason": reason}
            record |= {"config": result_part(config), "host": records.host(config["device"])}
            records.write(results, record)
            print(f"{identity}: failed, {reason}", file=sys.stderr)
        if record["status"] == "failed":
            failed.append(f"  {identity} {_describe(config)}: {record['reason']}")
    if failed:
        print(f"{len(failed)} of {len(missing)} runs failed:", *failed, sep="\n", file=sys.stderr)
    return 1 if failed else 0


def report(name: str, arguments: list[str]) -> int:
    """Writes the experiment's files, prints the table and the paths."""
    from kalmannorm import report as reports
    from kalmannorm.report import render, table

    experiment = load(name, arguments)
    kind = experiment.card.get("kind", "table")
    results = Path(experiment.runs[0]["results"] if experiment.runs else "results")
    found = reports.records(results, records.NUMERICS)
    paths = reports.write(experiment.card, found, results)
    if kind == "table":
        print(render.text(table.table(experiment.card, found)))
    elif kind == "pending":
        print(render.text(table.pending(experiment.card)))
    for path in paths:
        print(path)
    return 0


def report_all(arguments: list[str]) -> int:
    """Writes all that the records give: tables, figures, claims.md, report.html; prints the paths."""
    from kalmannorm import report as reports

    results = place_of_results(arguments)
    paths, problems = reports.write_all(reports.records(results, records.NUMERICS), results)
    for problem in problems:
        print(problem, file=sys.stderr)
    for path in paths:
        print(path)
    return 0


def compare(runs: list[str], arguments: list[str]) -> int:
    """Prints two runs beside each other."""
    from kalmannorm.report.compare import compare as compared

    print(compared(place_of_results(arguments), *runs))
    return 0


def place_of_results(arguments: list[str]) -> Path:
    """The results folder, where no other override means anything. UserError: another override."""
    for argument in arguments:
        if not argument.startswith("results="):
            raise UserError(f"{argument!r}: expected results=FOLDER and nothing else; settings are in the records")
    return Path(next((a.partition("=")[2] for a in reversed(arguments)), "results"))


def _announce(experiment: Experiment, missing: list[Config], found: read.Records) -> None:
    """The runs, and how long the missing ones should take, from the speed of runs like them on this machine."""
    todo = {records.run_id(config) for config in missing}
    print(f"{experiment.card['name']}: {experiment.card['title']}", file=sys.stderr)
    seconds, unknown = 0.0, 0
    for key, config in zip(experiment.keys, experiment.runs, strict=True):
        identity = records.run_id(config)
        if identity not in todo:
            state = "done"
        elif (predicted := _predict(config, found)) is None:
            state, unknown = "to run, time not known", unknown + 1
        else:
            state, seconds = f"to run, about {_duration(predicted)}", seconds + predicted
        print(f"  {identity}  {key:18} seed {config['seed']}  {state}", file=sys.stderr)
    total = f"about {_duration(seconds)}" if seconds else ""
    rest = f"{unknown} of a kind not yet measured here" if unknown else ""
    print(
        f"{len(missing)} of {len(experiment.runs)} runs to do", *filter(None, (total, rest)), sep=", ", file=sys.stderr
    )


def _predict(config: Config, found: read.Records) -> float | None:
    """Seconds of a run: those of the recorded runs of the same network, resolution and device, by epochs and images."""

    def kind(c: Config) -> tuple[Any, ...]:
        return c["arch"], c["norm"]["name"], c["norm"].get("predictor"), c["budget"]["size"], c["dataset"]["name"]

    def work(c: Config) -> float:
        return c["budget"]["epochs"] * (c["budget"]["subset"] or 1)

    rates = [
        record["host"]["seconds"] / work(record["config"])
        for record in (*found.current, *found.stale)
        if record["status"] == "done"
        and kind(record["config"]) == kind(config)
        and (record["config"]["budget"]["subset"] is None) == (config["budget"]["subset"] is None)
        and record["host"]["device"].split(":")[0] == config["device"].split(":")[0]
    ]
    return sorted(rates)[len(rates) // 2] * work(config) if rates else None


def _describe(config: Config) -> str:
    norm, batch, budget = config["norm"], config["batch"], config["budget"]
    return (
        f"{config['dataset']['name']} {config['arch']['name']} {norm['name']} "
        f"({batch['grad_batch']},{batch['stat_batch']}) {budget['name']} seed {config['seed']}"
    )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
