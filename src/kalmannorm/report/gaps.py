"""The small arrays beside the records: variance gaps per channel and batch, and per layer; errors per layer."""

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kalmannorm.errors import UserError
from kalmannorm.presets import BATCH_STATISTICS
from kalmannorm.report import caption, cells
from kalmannorm.report.read import Record, Records

Array = NDArray[np.float64]
CHANNELS = ("gap_measured", "moving_var")  # every record with batch statistics has these; KN has gap_used as well
LAYERS = ("layer_gap_measured",)
ERRORS = tuple(f"layer_error_{moment}{part}" for moment in ("mean", "var") for part in ("", "_bias", "_spread"))
EPS = 1e-5  # torch's default for normalizers, which the models here keep: a channel that is always 0 divides by it


@dataclass(frozen=True)
class Gaps:
    """One run's variance gaps. `used` and `layer_used` are None where the measurement itself normalizes (BN)."""

    record: Record
    measured: Array  # [C, B]: mean |variance of a batch - moving variance| of the batches in a bin
    used: Array | None  # [C, B]: the same of the variance that normalizes, KN's posterior
    moving: Array  # [C]: the moving variance
    layer_measured: Array  # [K]: relative gap per normalizer, in network order
    layer_used: Array | None  # [K]
    last: dict[str, int]  # the last normalizers, with their channels, in the order of C; empty where not known
    batches: int | None  # how many batches the bins hold; None where that is not known
    errors: dict[str, Array] | None  # train/layer_errors.py: [3, K] each by name; None where an earlier version ran

    @property
    def seed(self) -> int:
        """The run's seed."""
        return int(self.record["config"]["seed"])

    @property
    def layers(self) -> list[str]:
        """The normalizers' names, in network order."""
        names = (self.record.get("norms") or {}).get("order") or []
        count = len(self.layer_measured)
        return names if len(names) == count else [str(i + 1) for i in range(count)]

    def relative(self, gap: Array) -> Array:
        """A gap [C, B] over what the normalizer divides by, the moving variance plus EPS."""
        return gap / (self.moving[:, None] + EPS)


def of_row(card: Mapping[str, Any], row: Mapping[str, Any], records: Records, command: str) -> list[Gaps]:
    """The gaps of a row's runs, in the order of their seeds. Raises UserError when there is none."""
    runs = records.of(row["config"])
    selection = cells.select(runs, cells.most_common([records.of(other["config"]) for other in card["rows"]]))
    if not selection.runs:
        state = f"all {len(runs)} failed" if selection.failed else "none is recorded"
        what = f"{caption.row_names(card['rows'])[row['key']]} ({caption.short([row['config']])})"
        raise UserError(
            f"{card['name']} needs a finished run of {what}, "
            f"but {state} in {records.folder / 'records'}. To run it: {command}"
        )
    return [load(record, records.folder / "records" / f"{record['id']}.npz") for record in selection.runs]


def one_seed(first: Sequence[Gaps], second: Sequence[Gaps]) -> tuple[Gaps, Gaps]:
    """A run of each row: of the lowest common seed, else the first of each."""
    pairs = [(a, b) for a in first for b in second if a.seed == b.seed]
    return min(pairs, key=lambda pair: pair[0].seed, default=(first[0], second[0]))


def load(record: Record, path: Path) -> Gaps:
    """The arrays beside a record. Raises UserError: missing, broken, or of another shape."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {key: np.asarray(stored[key], dtype=np.float64) for key in stored.files}
    except FileNotFoundError as error:
        if record["config"]["norm"]["name"] not in BATCH_STATISTICS:
            raise UserError(
                f"run {record['id']} has no arrays: {record['config']['norm']['name']} has no batch statistics"
            ) from error
        what = f"restore it, or remove {record['id']}.json and run again"
        raise UserError(f"{path} is missing beside its record: {what}") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read ({error}): remove it and {record['id']}.json, and run again") from error
    if missing := [key for key in (*CHANNELS, *LAYERS) if key not in arrays]:
        raise UserError(f"{path} has no {', '.join(missing)} (it holds {', '.join(arrays) or 'nothing'}): run it again")
    channels = len(arrays["moving_var"])
    for key in ("gap_measured", "gap_used"):
        if key in arrays and (arrays[key].ndim != 2 or len(arrays[key]) != channels):
            raise UserError(f"{path}: {key} has shape {arrays[key].shape}, expected [{channels}, bins]: run it again")
    layers = len(arrays["layer_gap_measured"])
    for key in ERRORS:
        if key in arrays and arrays[key].shape != (3, layers):
            raise UserError(f"{path}: {key} has shape {arrays[key].shape}, expected (3, {layers}): run it again")
    return Gaps(
        record=record,
        measured=arrays["gap_measured"],
        used=arrays.get("gap_used"),
        moving=arrays["moving_var"],
        layer_measured=arrays["layer_gap_measured"],
        layer_used=arrays.get("layer_gap_used"),
        last=_last(record, arrays),
        batches=_batches(record),
        errors={key: arrays[key] for key in ERRORS} if all(key in arrays for key in ERRORS) else None,
    )


def _last(record: Record, arrays: Mapping[str, Array]) -> dict[str, int]:
    """Names from the record, number of channels from the array `last_channels` where it is stored."""
    names = (record.get("norms") or {}).get("last") or []
    sizes = [int(size) for size in arrays.get("last_channels", ())]
    fits = len(sizes) == len(names) and sum(sizes) == len(arrays["moving_var"])
    return dict(zip(names, sizes, strict=True)) if fits else {}


def _batches(record: Record) -> int | None:
    """From the size of the training set; its last batch is filled up."""
    grad, stat = caption.batches(record["config"])
    images = (record.get("data") or {}).get("train_images")
    return -(-int(images) // (stat or grad)) if images else None
