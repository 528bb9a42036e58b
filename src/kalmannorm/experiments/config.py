"""Turn overrides into the configuration of one run: compose, resolve and check it before any data is read."""

import functools
import hashlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

from kalmannorm import machine
from kalmannorm.errors import UserError, nearest, reason
from kalmannorm.experiments import composition
from kalmannorm.experiments.schema import STRICT, Group, Int, Name, Part, Positive, expect, unknown
from kalmannorm.experiments.settings import (
    Arch,
    Batch,
    Budget,
    Dataset,
    DetectionSchedule,
    Norm,
    Schedule,
    read_dataset,
    read_schedule,
)
from kalmannorm.presets import BATCH_STATISTICS, KALMAN, PRESETS, SPAN_DEVICES, WHOLE_BATCH, preset_options

GROUPS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "dataset": read_dataset,
    "arch": Arch.read,
    "norm": Norm.read,
    "batch": Batch.read,
    "schedule": read_schedule,
    "budget": Budget.read,
}
# The settings that determine a run's result, and so its id; all others say where it runs.
RESULT_KEYS = (*GROUPS, "seed", "precision", "compile", "deterministic")
# The settings that a data set may give in its `budgets`: for all tasks, for detection, for segmentation.
BUDGET_KEYS = (
    *("epochs", "warmup", "subset", "size"),
    *("steps", "train_images_evaluated", "width", "max_size", "boxes", "proposals", "candidates", "roi_size"),
    "crop",
)
NEED_WHOLE_BATCH = ("guard", "mean_batch", "var_batch")  # options that need the whole batch at once
COMPILE_FROM = 1000  # steps: on a CPU, shorter runs lose more time to the compiler than it saves


def _device(name: str) -> str:
    if not re.fullmatch(r"cpu|mps|cuda(:\d{1,3})?", name):
        raise PydanticCustomError("device", "Input should be cpu, mps, cuda, or cuda:0 and so on")
    return name


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Config(Group):
    """The settings of one run: those that determine its result, and those that say where it runs."""

    dataset: Dataset
    arch: Arch
    norm: Norm
    batch: Batch
    schedule: Schedule | DetectionSchedule
    budget: Budget
    seed: Annotated[Int, Field(ge=0, le=2**63 - 1)]
    precision: Literal["fp32", "bf16"]
    compile: bool
    deterministic: bool
    # Where it runs.
    device: Annotated[str, AfterValidator(_device)] = "cpu"
    data: str | None = None  # root of the data sets; None: $KALMANNORM_DATA, else ./data
    results: Name = "results"
    runs: Name = "runs"
    weights: str | None = None
    accumulate: Positive = 1  # micro-batches
    workers: Literal["auto"] | Annotated[Int, Field(ge=0, le=1024)] = "auto"
    checkpoint_every: Part = 0.05  # of the run's steps

    def __post_init__(self) -> None:
        """Raise UserError if the subset has fewer images than one step."""
        subset, grad = self.budget.subset, self.batch.grad_batch
        expect(subset is None or subset >= grad, "budget.subset", subset, f"null or at least one step's {grad} images")

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Self:
        """Make a configuration from plain values, as `values` returns them. UserError: unknown setting, bad value."""
        return super().read({key: GROUPS[key](of) if key in GROUPS else of for key, of in values.items()})

    def values(self) -> dict[str, Any]:
        """Return all settings as plain values."""
        return {key: of.values() if key in GROUPS else of for key, of in super().values().items()}

    def result(self) -> dict[str, Any]:
        """Return the settings that determine the result, as plain values: the id is their hash; a record holds them."""
        values = self.values()
        return {key: values[key] for key in RESULT_KEYS}

    @property
    def task(self) -> str:
        """The task that the network learns: classification, detection or segmentation."""
        return getattr(self.dataset, "task", "classification")


def conf_dir() -> Path:
    """Return the folder conf/: that of the checkout, or inside the package if it was installed from a wheel."""
    package = Path(__file__).resolve().parents[1]
    candidates = (package / "conf", package.parents[1] / "conf")
    found = next((c for c in candidates if (c / "config.yaml").exists()), None)
    if found is None:
        raise UserError(f"no configuration found: looked for config.yaml in {' and '.join(map(str, candidates))}")
    return found


def compose(overrides: list[str]) -> Config:
    """Return the configuration of one run. UserError: unknown names or values, impossible combinations."""
    values = composition.compose(conf_dir(), overrides)
    for group in GROUPS:
        expect(isinstance(values[group], dict), group, values[group], f"settings; a choice is {group}=NAME without a +")
    for budget, own in values["dataset"].pop("budgets").items():  # the chosen budget is in values["budget"]
        expect(isinstance(own, dict), f"dataset.budgets.{budget}", own, "settings")
        for key in own.keys() - set(BUDGET_KEYS):
            raise unknown(key, BUDGET_KEYS, f"dataset.budgets.{budget}.")
    _check_names(values)
    return _resolve(values)


def _check_names(values: Mapping[str, Any]) -> None:
    """Raise UserError for the name of a network, normalizer, schedule or budget that is in no file of conf/.

    Data sets are not checked: a folder of images may have any name.
    """
    for group in ("arch", "norm", "schedule", "budget"):
        known = _names(conf_dir() / group)
        if values[group].get("name") not in known:
            raise UserError(nearest(str(values[group].get("name")), known, f"{group}.name"))


@functools.cache
def _names(folder: Path) -> tuple[str, ...]:
    """Return the `name` values in the files of a group's folder."""
    named = (
        re.search(r"^name: *([\w-]+)", (folder / f"{file}.yaml").read_text("utf-8", "replace"), re.MULTILINE)
        for file in composition.choices(folder)
    )
    return tuple(dict.fromkeys(match[1] for match in named if match))


def describe(result: Mapping[str, Any]) -> str:
    """Describe a run in one line, from `Config.result()`."""
    names = " ".join(result[group]["name"] for group in ("dataset", "arch", "norm"))
    return f"{names} {batches(result)} {result['budget']['name']} seed {result['seed']}"


def batches(result: Mapping[str, Any]) -> str:
    """Return "(images per step,images that share statistics)", "-" for a normalizer without batch statistics."""
    return f"({result['batch']['grad_batch']},{result['batch']['stat_batch'] or '-'})"


def check_batches(config: Config, devices: int) -> None:
    """Raise UserError unless every micro-batch on every device consists of whole statistics groups."""
    grad, stat, parts, name = config.batch.grad_batch, config.batch.stat_batch, config.accumulate, config.norm.name
    where = f"{devices} devices" + (f" x accumulate = {parts}" if parts > 1 else "")
    if grad % (devices * parts):
        raise UserError(f"batch.grad_batch = {grad} does not divide among {where}")
    if stat is not None and name not in SPAN_DEVICES and (grad // (devices * parts)) % stat:
        groups = f"no whole groups of batch.stat_batch = {stat}, and a group cannot span devices; take fewer devices"
        raise UserError(f"batch.grad_batch = {grad} on {where}: {grad // (devices * parts)} images each are {groups}")
    whole = [key for key in NEED_WHOLE_BATCH if config.norm.options.get(key) is not None]
    if parts > 1 and (name in SPAN_DEVICES or whole):
        what = name if name in SPAN_DEVICES else f"norm.options.{whole[0]}"
        raise UserError(f"accumulate = {parts}: {what} looks at the whole batch, not at one micro-batch at a time")


def _resolve(values: dict[str, Any]) -> Config:
    """Replace `auto` and null by the values they stand for, so that the record says what ran."""
    if values["dataset"].get("classes") == "auto" and "folder" in values["dataset"]:
        from kalmannorm import data

        values["dataset"]["classes"] = data.folder.count_classes(data.root(values["data"]), values["dataset"])
    if "pretrained" in values["arch"]:
        raise UserError(
            f"arch.pretrained = {values['arch']['pretrained']}: expected no such setting; pass weights=FILE"
        )
    task, weights, of_videos = values["dataset"].get("task"), values["weights"], "frames" in values["dataset"]
    detects = task == "detection"
    if weights is not None and task is None and not of_videos:
        raise UserError(f"weights = {weights}: only detectors, segmenters and videos' networks take them; leave it out")
    if weights is not None or task is not None:
        values["arch"] |= _resolve_weights(values["arch"], weights, detects)
    if values["device"] == "auto":
        values["device"] = "cuda" if machine.has_gpu() else "cpu"
    on_gpu = str(values["device"]).startswith("cuda")
    automatic = [key for key in ("precision", "compile") if values[key] == "auto"]
    if "precision" in automatic:
        # No bfloat16 for videos on a CPU: torch's gradient of a convolution over two frames is not finite there.
        fast = on_gpu or (machine.multiplies_bfloat16() and not detects and not of_videos)
        values["precision"] = "bf16" if fast else "fp32"
    if "compile" in automatic:
        values["compile"] = False
    config = Config.read(values)
    if "compile" in automatic and not detects:  # batches of a detector all differ in shape: each would be compiled
        # On a CPU the compiler takes a minute and halves the time of a step, even without bfloat16 instructions.
        on_cpu = config.device == "cpu" and not of_videos and machine.has_compiler()
        config = replace(config, compile=on_gpu or (on_cpu and _steps(config) >= COMPILE_FROM))
    return replace(config, **_resolve_norm(config.norm, config.batch, config.arch.options.get("head_norm")))


def _resolve_norm(norm: Norm, batch: Batch, head_norm: str | None) -> dict[str, Any]:
    """Return {"norm", "batch"}: the normalizer with its preset's options, the batch with `stat_batch` filled in.

    `head_norm`: the normalizer of a detector's heads, whose statistics the batch may be for as well.
    """
    if norm.name not in BATCH_STATISTICS and head_norm not in BATCH_STATISTICS:
        batch = replace(batch, stat_batch=None)  # has no effect here: all columns of a card share one run
    elif batch.stat_batch is None or norm.name in WHOLE_BATCH:
        batch = replace(batch, stat_batch=batch.grad_batch)
    if norm.name in KALMAN:
        given = {key: value for key, value in norm.options.items() if value is not None}
        try:
            options = preset_options(norm.preset, norm.name, batch.stat_batch, given)  # type: ignore[arg-type]
        except ValueError as error:
            raise UserError(f"norm.preset: {error}") from None
        predictor = norm.predictor or PRESETS[norm.preset]["predictor"]  # type: ignore[index]
        norm = replace(norm, options=options, predictor=predictor)
    return {"norm": norm, "batch": batch}


def _resolve_weights(arch: Mapping[str, Any], file: str | None, detects: bool) -> dict[str, Any]:
    """Return arch settings: `pretrained`, the sha256 of the weights file, None for training from scratch; and, unless a
    detector's configuration says it, `frozen_stages`."""
    found: dict[str, Any] = {"pretrained": None}
    if file is not None:
        try:
            with Path(file).expanduser().open("rb") as stream:
                found["pretrained"] = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"weights = {file}: {reason(error)}; expected a .pth or .safetensors file") from None
    if detects and arch.get("frozen_stages") is None:
        found["frozen_stages"] = 0 if file is None else 2
    return found


def _steps(config: Config) -> float:
    """Estimate the number of steps of the run; a data set of unknown size counts as infinitely large."""
    budget, published = config.budget, config.dataset.published
    images = budget.subset or (published[0] if published else math.inf)
    return min(float(budget.epochs * images / config.batch.grad_batch), budget.stop_after or math.inf)
