"""Implement `kalmannorm records`: show the records of a results folder, merge in other folders, remove stale ones."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kalmannorm.errors import UserError, nearest
from kalmannorm.experiments.composition import choices, expand, parse
from kalmannorm.experiments.config import conf_dir, describe
from kalmannorm.experiments.predict import duration
from kalmannorm.experiments.record import NUMERICS, Record, Tree, files, reached, read_all, read_file
from kalmannorm.files import write_atomically

STATES = ("done", "failed")
CHOICES = ("arch", "batch", "budget", "norm", "schedule")  # groups whose choices are all in conf/
HEADER = ("id", "status", "run", "moving %", "online %", "images/s", "time", "device", "started")


def show(results: str, overrides: list[str]) -> int:
    """Print a table of the records that match all `overrides`, of norm=bn,bkn either; stale ones are marked."""
    _expect_folder(results)
    every = read_all(results)
    tests = [[_predicate(one, every) for one in _each(override)] for override in overrides]
    chosen = [r for r in every if all(any(test(r) for test in values) for values in tests)]
    rows = [_row(record) for record in sorted(chosen, key=lambda r: (describe(r["config"]), r["id"]))]
    if every and not rows:
        print(f"none of the {len(every)} records in {results} matches {' '.join(overrides)}", file=sys.stderr)
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(*HEADER, box=None, caption=f"{len(rows)} of {len(every)} records")
        for row in rows:
            table.add_row(*row)
        Console().print(table)
    else:
        print("\n".join("\t".join(row) for row in (HEADER, *rows)))
    return 0


def merge(results: str, folders: list[str]) -> int:
    """Copy records, and the arrays beside them, from `folders` into `results`. Return 1 if one could not be taken.

    A record that `results` has already is kept, but a done one replaces a failed one. Two records are in conflict if
    they differ in more than `host` and the new one did not fail.
    """
    sources = [(folder, file) for folder in folders for file in _files(folder)]
    taken = known = 0
    problems: list[str] = []
    for folder, file in sources:
        try:
            record = read_file(file)
            target = Path(results) / "records" / file.name
            here = read_file(target) if target.exists() else None
        except UserError as error:
            problems.append(str(error))
            continue
        if here is not None and here["status"] == "failed" and record["status"] == "done":
            here = None  # replaced, as by a sweep that is run again
        if here is not None and record["status"] == "failed":
            known += 1
            continue
        keys = sorted({*(here or ()), *record} - {"host"})
        if here is not None and (what := ", ".join(key for key in keys if here.get(key) != record.get(key))):
            problems.append(f"{file.stem}: {results} and {folder} differ in {what}; that of {results} stays")
            continue
        arrays = file.with_suffix(".npz")
        if arrays.exists() and (here is None or not target.with_suffix(".npz").exists()):
            write_atomically(target.with_suffix(".npz"), arrays.read_bytes())
        if here is None:
            write_atomically(target, file.read_bytes())
            taken += 1
        else:
            known += 1
    print(f"{taken} records taken into {results}, {known} were there, {len(problems)} not taken")
    for problem in problems:
        print(f"  {problem}", file=sys.stderr)
    return 1 if problems else 0


def prune(results: str, failed: bool = False, yes: bool = False) -> int:
    """List stale records and unusable files, with `failed` also failed runs; delete them if `yes`. Records of a newer
    version of the code stay."""
    doomed: list[tuple[Path, str]] = []
    _expect_folder(results)
    for file in files(results):
        if file.is_dir():
            print(f"{file}: a folder, which stays: move it away", file=sys.stderr)
            continue
        try:
            record = read_file(file)
        except UserError as error:
            doomed.append((file, str(error).removeprefix(f"{file} ").partition(". ")[0]))
            continue
        stale = f"stale: made by NUMERICS {record['numerics']}, this is {NUMERICS}"
        if record["numerics"] > NUMERICS:
            print(f"{file}: {stale}; of a newer version, which stays")
        elif record["numerics"] < NUMERICS:
            doomed.append((file, stale))
        elif failed and record["status"] == "failed":
            doomed.append((file, f"failed: {record['reason']}"))
    for file, reason in doomed:
        print(f"{file}: {reason}")
        if yes:
            file.unlink()
            file.with_suffix(".npz").unlink(missing_ok=True)
    print(f"{len(doomed)} records", "deleted" if yes else "to delete: pass --yes" if doomed else "to delete")
    return 0


def _row(record: Record) -> tuple[str, ...]:
    host, final = record.get("host") or {}, record.get("final") or {}
    numbers = [reached(final[kind]) if kind in final else "" for kind in ("moving", "online")]
    return (
        record["id"],
        record["status"] if record["numerics"] == NUMERICS else f"stale ({record['numerics']})",
        describe(record["config"]),
        *numbers,
        str(host.get("images_per_s") or ""),
        duration(host["seconds"]) if "seconds" in host else "",
        str(host.get("hardware") or host.get("device") or ""),
        str(host.get("started") or ""),
    )


def _each(override: str) -> list[str]:
    """Return an override for each of its values. UserError: no key=value."""
    if override[:1] in "+~" or "=" not in override:
        raise UserError(f"{override!r}: expected key=value, for example norm=bkn, seed=1,2 or status=failed")
    return expand(override)


def _predicate(override: str, every: Sequence[Record]) -> Callable[[Record], bool]:
    """Return a test of records for key=value: a choice (norm=bkn), a setting (batch.stat_batch=2), or status=failed.

    UserError: an unknown choice, or a setting that no record has.
    """
    key, _, text = override.partition("=")
    if key == "status":
        if text not in STATES:
            raise UserError(nearest(text, STATES, "status"))
        return lambda record: record["status"] == text
    choice = conf_dir() / key / f"{text}.yaml"
    if choice.exists():
        from kalmannorm.experiments.config import compose

        # A record matches a choice by its name, or by all its settings if it has none.
        composed = compose([override]).values()[key]
        wanted = {"name": composed["name"]} if "name" in composed else composed
        return lambda record: all(record["config"][key].get(name) == value for name, value in wanted.items())
    if key in CHOICES:
        names = choices(choice.parent)
        raise UserError(nearest(text, names, key, f"conf/{key}/ has all {len(names)}"))
    recorded = {record["config"]["dataset"]["name"] for record in every}  # a folder of images may have any name
    if key == "dataset" and text not in recorded:
        raise UserError(
            nearest(text, sorted({*recorded, *choices(choice.parent)}), key, "`kalmannorm records list` shows all")
        )
    path = key.split(".")
    if every and all(_setting(record["config"], path, override) is None for record in every):
        raise UserError(f"{override!r}: no record has a setting {key}")
    value = parse(override).value()
    return lambda record: _setting(record["config"], path, override) == value


def _setting(config: Tree, path: list[str], override: str) -> Any:
    found: Any = config
    for name in path:
        if not isinstance(found, dict):
            raise UserError(
                f"{override!r}: no record has such a setting; the key 'config' of a record has those there are"
            )
        found = found.get(name)
        if found is None:
            return None
    return found["name"] if isinstance(found, dict) and "name" in found else found


def _expect_folder(results: str) -> None:
    if not Path(results).is_dir():
        raise UserError(f"results={results} is no folder: there are no records; name another by results=")


def _files(folder: str) -> list[Path]:
    """Return the record files of a results folder, given by its own path or by that of its folder `records`."""
    path = Path(folder)
    if path.name == "records" and not (path / "records").exists():
        path = path.parent
    if not (path / "records").is_dir():
        raise UserError(f"{folder} is not a results folder: expected a folder with a folder 'records' in it")
    return files(path)
