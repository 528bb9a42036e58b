"""Run records: results/records/<id>.json, and beside it <id>.npz with the small arrays that figures draw.

Schema, writer, reader and the one check of what is read. Tables read records and nothing else. A record is written
whole or not at all, the JSON last.
"""

import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NotRequired, TypedDict, get_args

from kalmannorm import machine
from kalmannorm.errors import UserError
from kalmannorm.experiments.config import RESULT_KEYS, Config
from kalmannorm.files import write_atomically

if TYPE_CHECKING:
    import numpy as np

# Raised when a change alters results: records of another number are listed as stale and never tabulated.
NUMERICS = 2

Status = Literal["done", "failed"]
Curves = dict[str, list[float]]  # one value an epoch each
Evaluation = dict[str, float | str | None]  # accuracy and loss, or a detector's AP, and of how many images
Tree = Mapping[str, Any]  # plain values in groups: what determines a result, as a record has it


class Record(TypedDict):
    """What is known of a run. Two records of one run are equal but for `host`.

    A failed run has what there was when it failed; one whose process died has the first five and `host` alone.
    """

    id: str
    numerics: int
    status: Status
    reason: str | None  # why it failed
    config: Tree  # what determines the result (config.RESULT_KEYS)
    host: machine.Host  # time and place (machine.host), seconds, images per second
    parameters: NotRequired[int]
    data: NotRequired[Tree]  # name, fidelity and sha256 of the data set, and how many images of it were used
    curves: NotRequired[Curves]
    final: NotRequired[dict[str, Evaluation]]  # by kind of statistics
    norms: NotRequired[Tree]  # the normalizers after training: order, gains, what has a belief
    weights: NotRequired[dict[str, str | None]]  # where a detector's come from
    final_on_training_images: NotRequired[Evaluation]  # a detector's


def run_id(config: Config) -> str:
    """Hash what determines the result: 12 hexadecimal digits."""
    return _hash(config.result(), NUMERICS)


def _hash(result: Tree, numerics: int) -> str:
    """Hash the configuration of a record made under `numerics`, which may be another version's."""
    text = json.dumps({"numerics": numerics, **{key: result[key] for key in RESULT_KEYS}}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def begin(config: Config, parameters: int, data: Tree, device: str, processes: int) -> Record:
    """Return what is known of a run before it trains. `parameters`: how many; `data`: provenance and sizes."""
    return {
        "id": run_id(config),
        "numerics": NUMERICS,
        "status": "done",
        "reason": None,
        "config": config.result(),
        "parameters": parameters,
        "data": data,
        "host": machine.host(device) | {"processes": processes},
    }


def add_speed(record: Record, images: int, train_seconds: float, seconds: float) -> None:
    """Note that `images` were trained on in `train_seconds`, of all processes of the run; `seconds`: of this one, with
    evaluation."""
    record["host"] |= {
        "seconds": round(seconds, 1),
        "train_seconds": round(train_seconds, 1),
        "images_per_s": round(images / train_seconds, 2) if train_seconds else None,
    }


def path(results: str | Path, identity: str) -> Path:
    """Name the record's file."""
    return Path(results) / "records" / f"{identity}.json"


def write(results: str | Path, record: Record, arrays: "Mapping[str, np.ndarray] | None" = None) -> Path:
    """Write the arrays, then the record; both by a temporary file and a rename."""
    file = path(results, record["id"])
    if arrays:
        import numpy as np

        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
        write_atomically(file.with_suffix(".npz"), buffer.getvalue())
    write_atomically(file, (json.dumps(record, indent=1, sort_keys=True, allow_nan=False) + "\n").encode())
    return file


def read(results: str | Path, identity: str) -> Record | None:
    """Return the record of a run, None where there is none. UserError as for read_file."""
    file = path(results, identity)
    return read_file(file) if file.exists() else None


def is_done(results: str | Path, identity: str) -> bool:
    """Say whether the run has a record and did not fail."""
    record = read(results, identity)
    return record is not None and record["status"] == "done"


def find(results: str | Path, run: str) -> Record:
    """Return the record whose id is `run` or begins with it. UserError: no such run, or several."""
    folder = Path(results) / "records"
    matches = sorted(folder.glob(f"{run}*.json")) if run.isalnum() else []
    if len(matches) != 1:
        found = "no run" if not matches else f"{len(matches)} runs"
        raise UserError(f"{found} in {folder} whose id begins with {run!r}: expected exactly one")
    return read_file(matches[0])


def files(results: str | Path) -> list[Path]:
    """Return the files in `results`/records, by name. UserError: not a results folder."""
    results = Path(results)
    folder = results / "records"
    if any(path.exists() and not path.is_dir() for path in (results, folder)):
        raise UserError(f"{results} is not a results folder: expected a folder with a folder 'records' in it")
    # A hidden file is one that its writer has not renamed to its final name.
    return sorted(path for path in folder.glob("*.json") if not path.name.startswith("."))


def read_all(results: str | Path) -> list[Record]:
    """Return all records of a results folder, by id; none where there is no folder.

    UserError as for read_file: a table must not silently lose a run.
    """
    return [read_file(path) for path in files(results)]


def current(found: Iterable[Record]) -> list[Record]:
    """Return those made under this NUMERICS; the others are stale."""
    return [record for record in found if record["numerics"] == NUMERICS]


def read_file(path: Path) -> Record:
    """Return the record in a file. UserError: it is not a whole record, or not that of its configuration."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): change its permissions or move it away") from error
    except ValueError as error:
        raise UserError(_broken(path, f"no valid JSON ({error}); it may be truncated")) from error
    if problem := _problem(record, path.stem):
        raise UserError(_broken(path, problem))
    return record  # type: ignore[no-any-return]


def _broken(path: Path, problem: str) -> str:
    return f"{path} is not a usable record: {problem}. Move it out of {path.parent} (or delete it) and run it again"


def _problem(record: object, stem: str) -> str | None:
    """Say what keeps a parsed file from being a record; None when nothing does."""
    if not isinstance(record, dict):
        return f"expected a JSON object, found {type(record).__name__}"
    for key, kind in (("id", str), ("numerics", int), ("status", str), ("config", dict)):
        if not isinstance(record.get(key), kind):
            return f"{key!r} is {record.get(key)!r}, expected a value of type {kind.__name__}"
    if record["id"] != stem:
        return f"its id {record['id']!r} is not the file's name {stem!r} (renamed, or a copy)"
    if record["status"] not in get_args(Status):
        return f"'status' is {record['status']!r}, expected 'done' or 'failed'"
    if not isinstance(record["config"].get("seed"), int):
        return f"'config.seed' is {record['config'].get('seed')!r}, expected an integer"
    if problem := _problem_of_results(record):
        return problem
    if missing := [key for key in RESULT_KEYS if key not in record["config"]]:
        return f"its config has no {', '.join(missing)}"
    if record["id"] != (expected := _hash(record["config"], record["numerics"])):
        return f"its id is not that of its configuration, {expected} (edited after the run, or made up)"
    return None


def _problem_of_results(record: dict[str, Any]) -> str | None:
    if record["status"] == "done":
        final = record.get("final")
        if not isinstance(final, dict) or not final:
            return "it is 'done' but has no 'final' values"
        for name, values in final.items():
            value = values.get("accuracy", values.get("box_ap")) if isinstance(values, dict) else None
            if not isinstance(value, int | float):
                return f"'final.{name}' has no number 'accuracy', nor a detector's 'box_ap'"
            if value < 0 or value > 100:  # NaN is neither: a cell says so
                return f"'final.{name}' is {value}, expected percent"
            curve = (record.get("curves") or {}).get(name) or []
            if curve and "accuracy" in values and curve[-1] is not None and abs(curve[-1] - value) > 0:
                return f"'final.{name}' is {value}, its curve ends with {curve[-1]} (edited after the run)"
        of, trained = (record.get("data") or {}).get("name"), record["config"].get("dataset", {}).get("name")
        if of is not None and of != trained:
            return f"its data are {of}, its configuration's {trained}"
    return None


def headline(values: Evaluation) -> str:
    """Say what a run reached under one kind of statistics, with its unit."""
    return f"{reached(values)} %" if "accuracy" in values else f"box / mask AP {reached(values)}"


def reached(values: Evaluation) -> str:
    """Say its number: accuracy in percent, a detector's "box / mask" AP; "-" for one that pycocotools does not give."""
    if "accuracy" in values:
        return f"{values['accuracy']:.2f}"
    found = (values.get(key) for key in ("box_ap", "mask_ap"))
    return " / ".join("-" if value is None else f"{value:.2f}" for value in found)
