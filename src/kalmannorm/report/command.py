"""`kalmannorm report`: an experiment's table or figure from the records, all of them, or two runs beside each other."""

import sys
from pathlib import Path

from kalmannorm import report as reports
from kalmannorm.errors import UserError
from kalmannorm.experiments import record as records
from kalmannorm.experiments.cards import load
from kalmannorm.report import render, variants
from kalmannorm.report.compare import compare as beside


def report(name: str, arguments: list[str]) -> int:
    """Writes the experiment's files, prints the table and the paths. `arguments`: as for experiments.cards.load."""
    experiment = load(name, arguments)
    named = {key: value for key, _, value in (argument.partition("=") for argument in arguments)}
    plain = load(name, [f"{key}={named[key]}" for key in ("dataset", "budget", "rows", "columns") if key in named])
    chosen = [f"{key}={named[key]}" for key in ("rows", "columns") if key in named]
    experiment.card["variant"] = [*variants.set_apart(experiment.card, plain.card), *variants.in_names(chosen)]
    results = Path(experiment.runs[0]["results"])
    found = reports.records(results, records.NUMERICS)
    table, files = reports.make(experiment.card, found)
    paths = reports.write_files(files, results)
    if table is not None:
        print(render.text(table))
    for path in paths:
        print(path)
    return 0


def report_all(arguments: list[str]) -> int:
    """Writes all that the records give: tables, figures, claims.md, report.html; prints the paths."""
    results = place_of_results(arguments)
    if not results.is_dir():
        raise UserError(f"results={results} is no folder: there is nothing to report")
    paths, problems = reports.write_all(reports.records(results, records.NUMERICS), results)
    for problem in problems:
        print(problem, file=sys.stderr)
    for path in paths:
        print(path)
    return 0


def compare(runs: list[str], arguments: list[str]) -> int:
    """Prints two runs beside each other."""
    print(beside(place_of_results(arguments), *runs))
    return 0


def place_of_results(arguments: list[str]) -> Path:
    """The results folder, where no other override means anything. UserError: another override."""
    for argument in arguments:
        if not argument.startswith("results="):
            raise UserError(f"{argument!r}: expected results=FOLDER and nothing else; settings are in the records")
    named = next((a.partition("=")[2] for a in reversed(arguments)), "results")
    if not named:
        raise UserError("results=: expected a folder")
    return Path(named)
