"""Write, read and check run records: results/records/<id>.json, beside it <id>.npz with small arrays for figures.

The schema gives type and range of every field, and every record is checked against it when it is read. Tables read
records and nothing else. A record is written whole or not at all, the JSON after the arrays.
"""

import functools
import hashlib
import io
import json
import math
import sys
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, Literal, NotRequired, cast

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict  # pydantic takes Python's own from 3.12 on

from kalmannorm import machine
from kalmannorm.errors import UserError, reason
from kalmannorm.experiments.config import RESULT_KEYS, Config
from kalmannorm.files import write_atomically

if TYPE_CHECKING:
    import numpy as np

# Incremented when a change alters results: records with another number are listed as stale and never tabulated.
NUMERICS = 2

# Limit for an array beside a record; arrays by layer and channel are far smaller for any network.
MAX_ARRAY_BYTES = 2**28

Status = Literal["done", "failed"]
# The metrics of the tasks, in percent: accuracy, a detector's average precision, a segmenter's mean intersection over
# union. The last two are shown together with a second number (PAIRS).
METRICS = ("accuracy", "box_ap", "miou")
PAIRS = {"box / mask AP": ("box_ap", "mask_ap"), "mIoU / pixel accuracy": ("miou", "pixel_accuracy")}
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


def _check_evaluation(values: dict[str, float | str | None]) -> dict[str, float | str | None]:
    """Return the values; raise ValueError for a value that no evaluation gives."""
    if not any(metric in values for metric in METRICS):
        raise ValueError(f"expected a number by one of the names {', '.join(METRICS)}")
    for name, value in values.items():
        if name == "definition":
            right, expected = isinstance(value, str), "text"
        elif name in ("images", "pixels", "batches", "detections"):
            least = 0 if name == "detections" else 1
            right, expected = isinstance(value, float) and value >= least and value.is_integer(), "how many"
        elif name == "loss":
            # None stands for a loss that was not finite.
            right, expected = value is None or (isinstance(value, float) and 0 <= value < math.inf), "a number from 0"
        else:
            right = isinstance(value, float) and 0 <= value <= 100
            right, expected = right or (value is None and name != "accuracy"), "percent"
        if not right:
            raise ValueError(f"{name!r} is {value!r}, expected {expected}")
    return values


def _check_curves(curves: dict[str, list[float]]) -> dict[str, list[float]]:
    """Return the curves; raise ValueError for curves of different lengths, or a value that no training gives."""
    if len({len(values) for values in curves.values()}) > 1:
        raise ValueError("expected lists of one length")
    for name, values in curves.items():
        counts = name in ("epoch", "step")
        if not all(math.isfinite(value) for value in values):
            raise ValueError(f"{name!r} holds a value that is not finite")
        if counts and (sorted(set(values)) != values or any(value != int(value) or value < 1 for value in values)):
            raise ValueError(f"{name!r} does not count upwards")
        if name in ("moving", "online", "train_accuracy") and any(not 0 <= value <= 100 for value in values):
            raise ValueError(f"{name!r} holds a value that is not a percentage")
    return curves


# One value per epoch in each list.
Curves = Annotated[dict[str, list[float]], AfterValidator(_check_curves)]
# The metric, the loss and the number of images. None: an average precision over no objects.
Evaluation = Annotated[dict[str, float | str | None], AfterValidator(_check_evaluation)]
Tree = Mapping[str, Any]  # plain values by group: `Config.result()`, as a record holds it


def _check_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings; raise ValueError if a group is missing or has the wrong form."""
    for group in ("arch", "budget", "dataset", "norm", "schedule"):
        if not (isinstance(settings[group], dict) and isinstance(settings[group].get("name"), str)):
            raise ValueError(f"{group!r} is {settings[group]!r:.80}, expected settings with a name")
    batch, seed = settings["batch"], settings["seed"]
    if not isinstance(batch, dict) or not {"grad_batch", "stat_batch"} <= batch.keys() or type(seed) is not int:
        raise ValueError("expected settings 'batch' (grad_batch, stat_batch) and an integer 'seed'")
    return settings


@with_config(ConfigDict(extra="allow"))
class Data(TypedDict, total=False):
    """A data set's provenance, and how many of its images were used; a data set of your own may add fields."""

    name: str
    fidelity: str
    sha256: str
    sha256_of: str
    loader: str
    train_images: Count
    test_images: Count
    files: Count
    unreadable: dict[str, Any]
    beton: dict[str, Any]
    other: dict[str, Any]  # the second data set that a segmenter is tested on


@with_config(ConfigDict(extra="forbid"))
class Norms(TypedDict, total=False):
    """The state of the normalizers after training, by their names (docs/records.md)."""

    order: list[str]
    last: list[str]
    gains: dict[str, Share]
    beliefs: dict[str, str | None]
    mixture: dict[str, dict[str, list[Share]]]
    choices: dict[str, dict[str, Any]]
    gamma_decay: dict[str, dict[str, float]]


@with_config(ConfigDict(extra="forbid"))
class Record(TypedDict):
    """The record of a run. Two records of the same run differ in `host` only.

    A failed run has the fields known when it failed; if its process died, the first five and `host`.
    """

    id: str
    numerics: int
    status: Status
    reason: str | None  # why it failed
    config: Annotated[
        dict[str, Any], AfterValidator(_check_settings)
    ]  # the settings that determine the result (config.RESULT_KEYS); the id is their hash
    host: machine.Host  # start, device, versions (machine.host); seconds, images per second
    parameters: NotRequired[Count]
    data: NotRequired[Data]
    curves: NotRequired[Curves]
    final: NotRequired[dict[str, Evaluation]]  # by kind of statistics
    norms: NotRequired[Norms]
    weights: NotRequired[dict[str, str | None]]  # provenance of a detector's pretrained weights
    final_on_training_images: NotRequired[Evaluation]  # for detectors


@functools.cache
def _schema() -> TypeAdapter[Record]:
    return TypeAdapter(Record)


def run_id(config: Config) -> str:
    """Return the run's id: 12 hexadecimal digits, a hash of the settings that determine its result."""
    return _hash(config.result(), NUMERICS)


def _hash(result: Tree, numerics: int) -> str:
    """Return the id for a record's configuration and `numerics`, which may be that of another version."""
    text = json.dumps({"numerics": numerics, **{key: result[key] for key in RESULT_KEYS}}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def begin(config: Config, parameters: int, data: Tree, device: str, processes: int) -> Record:
    """Return the record of a run that has not trained yet. `parameters`: their number; `data`: provenance and sizes."""
    return {
        "id": run_id(config),
        "numerics": NUMERICS,
        "status": "done",
        "reason": None,
        "config": config.result(),
        "parameters": parameters,
        "data": cast(Data, data),
        "host": machine.host(device) | {"processes": processes},
    }


def add_speed(record: Record, images: int, train_seconds: float, seconds: float) -> None:
    """Add the speed: `images` trained on in `train_seconds`; `seconds`: time of this process, evaluation included."""
    record["host"] |= {
        "seconds": round(seconds, 1),
        "train_seconds": round(train_seconds, 1),
        "images_per_s": round(images / train_seconds, 2) if train_seconds else None,
    }


def path(results: str | Path, identity: str) -> Path:
    """Return the path of a run's record."""
    return Path(results) / "records" / f"{identity}.json"


def write(results: str | Path, record: Record, arrays: "Mapping[str, np.ndarray] | None" = None) -> Path:
    """Write the arrays, then the record, each whole or not at all, and return the record's path. UserError: no
    permission, no space."""
    file = path(results, record["id"])
    if arrays:
        import numpy as np

        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
        write_atomically(file.with_suffix(".npz"), buffer.getvalue())
    write_atomically(file, (json.dumps(record, indent=1, sort_keys=True, allow_nan=False) + "\n").encode())
    return file


def arrays(identity: str, results: str | Path = "results") -> "dict[str, np.ndarray]":
    """Return the arrays beside one run's record (docs/records.md), in double precision.

    UserError: the file is missing or broken, or an array is larger than MAX_ARRAY_BYTES.
    """
    import numpy as np

    file = path(results, identity).with_suffix(".npz")
    try:
        with zipfile.ZipFile(file) as archive:
            for member in archive.infolist():
                with archive.open(member) as stream:
                    _check_claim(stream, member.file_size)
        with np.load(file, allow_pickle=False) as stored:
            return {key: np.asarray(stored[key], dtype=np.float64) for key in stored.files}
    except FileNotFoundError:
        raise UserError(f"{file} is missing beside its record: restore it, or remove that and run again") from None
    except Exception as error:  # numpy and zipfile raise many kinds
        raise UserError(f"{file} cannot be read ({reason(error)}): remove it and the record, and run again") from None


def arrays_if_any(identity: str, results: str | Path) -> "dict[str, np.ndarray]":
    """Return the arrays beside one run's record; {} if there is no file, or, with a line on stderr, no usable one."""
    try:
        return arrays(identity, results)
    except UserError as error:
        if path(results, identity).with_suffix(".npz").exists():
            _say(f"left out: {error}")
        return {}


def _check_claim(stream: IO[bytes], size: int) -> None:
    """Raise ValueError if the header of a .npy file claims more bytes than its `size` or than MAX_ARRAY_BYTES."""
    from numpy.lib import format

    read_header = {(1, 0): format.read_array_header_1_0, (2, 0): format.read_array_header_2_0}[
        format.read_magic(stream)
    ]
    shape, _, dtype = read_header(stream)
    if max(size, math.prod(shape) * dtype.itemsize) > min(MAX_ARRAY_BYTES, size):
        raise ValueError(f"an array of {list(shape)} {dtype} in {size:,} bytes")


def read(results: str | Path, identity: str) -> Record | None:
    """Return the record of a run, None if it has none. UserError as for read_file: a broken record may be repairable,
    and training the run again would overwrite it."""
    file = path(results, identity)
    return read_file(file) if file.exists() else None


def is_done(results: str | Path, identity: str) -> bool:
    """Say whether the run has a record and did not fail."""
    record = read(results, identity)
    return record is not None and record["status"] == "done"


def find(results: str | Path, run: str) -> Record:
    """Return the record whose id is `run` or begins with it. UserError: there is none, or more than one."""
    folder = Path(results) / "records"
    matches = sorted(folder.glob(f"{run}*.json")) if run.isalnum() else []
    if len(matches) != 1:
        found = "no run" if not matches else f"{len(matches)} runs"
        raise UserError(f"{found} in {folder} whose id begins with {run!r}: expected exactly one")
    return read_file(matches[0])


def files(results: str | Path) -> list[Path]:
    """Return the .json files in `results`/records, sorted by name. UserError: `results` is not a results folder."""
    results = Path(results)
    folder = results / "records"
    if any(path.exists() and not path.is_dir() for path in (results, folder)):
        raise UserError(f"{results} is not a results folder: expected a folder with a folder 'records' in it")
    return sorted(folder.glob("[!.]*.json"))  # hidden files are still being written, and renamed at the end


def read_all(results: str | Path) -> list[Record]:
    """Return all usable records of a results folder, sorted by id. Other files are left out, with a line on stderr."""
    found = []
    for path in files(results):
        try:
            record = read_file(path)
            if record["numerics"] != NUMERICS and (problem := _problem_of_fields(record)):  # type: ignore[arg-type]
                raise UserError(f"{path} is of another version (NUMERICS {record['numerics']}), and {problem}")
            found.append(record)
        except UserError as error:
            _say(f"left out: {error}")
    return found


def current(found: Iterable[Record]) -> list[Record]:
    """Return the records made under the present NUMERICS; all others are stale."""
    return [record for record in found if record["numerics"] == NUMERICS]


def read_file(path: Path) -> Record:
    """Return the record in a file. UserError: it is not a valid record, or its id does not fit its configuration."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): change its permissions or move it away") from error
    except (ValueError, RecursionError) as error:
        raise UserError(_broken(path, f"no valid JSON ({error}); it may be truncated")) from error
    if problem := _problem(record, path.stem):
        raise UserError(_broken(path, problem))
    return record  # type: ignore[no-any-return]


@functools.cache  # prints each line once per process, however often the folder is read
def _say(line: str) -> None:
    print(f"kalmannorm: {line}", file=sys.stderr)


def _broken(path: Path, problem: str) -> str:
    return f"{path} is not a usable record: {problem}. Move it out of {path.parent} (or delete it) and run it again"


def _problem(record: object, stem: str) -> str | None:
    """Say why a parsed file is no usable record; None if it is one."""
    if not isinstance(record, dict):
        return f"expected a JSON object, found {type(record).__name__}"
    for key, kind in (("id", str), ("numerics", int), ("config", dict)):
        if not isinstance(record.get(key), kind):
            return f"{key!r} is {record.get(key)!r}, expected a value of type {kind.__name__}"
    if record["id"] != stem:
        return f"its id {record['id']!r} is not the file's name {stem!r} (renamed, or a copy)"
    if missing := [key for key in RESULT_KEYS if key not in record["config"]]:
        return f"its config has no {', '.join(missing)}"
    if record["id"] != (expected := _hash(record["config"], record["numerics"])):
        return f"its id is not that of its configuration, {expected} (edited after the run, or made up)"
    # A record of another version follows another schema, and is stale anyway.
    return None if record["numerics"] != NUMERICS else _problem_of_fields(record)


def _problem_of_fields(record: dict[str, Any]) -> str | None:
    """Say which field does not follow the schema, or contradicts another field; None if none does."""
    try:
        _schema().validate_python(record, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        found = "" if first["type"] in ("missing", "value_error") else f" is {first['input']!r:.80}"
        message = first["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
        return f"'{'.'.join(map(str, first['loc']))}'{found}: {message}"
    if record["status"] == "done" and not record.get("final"):
        return "it is 'done' but has no 'final' values"
    for name, values in record.get("final", {}).items():
        curve = record.get("curves", {}).get(name)
        if curve and "accuracy" in values and curve[-1] != values["accuracy"]:
            return f"'final.{name}' is {values['accuracy']}, its curve ends with {curve[-1]} (edited after the run)"
    of, trained = record.get("data", {}).get("name"), record["config"]["dataset"]["name"]
    if of is not None and of != trained:
        return f"its data are {of}, its configuration's {trained}"
    return None


def headline(values: Evaluation) -> str:
    """Return a run's result under one kind of statistics as text with its unit or metric: "93.10 %"."""
    return f"{reached(values)} %" if "accuracy" in values else f"{_kind(values)} {reached(values)}"


def reached(values: Evaluation) -> str:
    """Return the metric as text: accuracy in percent, or both numbers of a pair in PAIRS; "-" for a missing one."""
    if "accuracy" in values:
        return f"{values['accuracy']:.2f}"
    found = (values.get(key) for key in PAIRS[_kind(values)])
    return " / ".join("-" if value is None else f"{value:.2f}" for value in found)


def _kind(values: Evaluation) -> str:
    return next(kind for kind, keys in PAIRS.items() if keys[0] in values)
