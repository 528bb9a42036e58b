"""From overrides to one run's configuration: composed by Hydra, resolved, checked before any data is touched."""

import hashlib
import math
import os
import shutil
from pathlib import Path
from typing import Any

from kalmannorm import machine
from kalmannorm.errors import UserError, nearest
from kalmannorm.experiments import composition
from kalmannorm.presets import BATCH_STATISTICS, KALMAN, PRESETS, SPAN_DEVICES, WHOLE_BATCH, preset_options

Config = dict[str, Any]

# What determines a run's result, and so its id; the rest says where it runs.
RESULT_KEYS = (
    "dataset",
    "arch",
    "norm",
    "batch",
    "schedule",
    "budget",
    "seed",
    "precision",
    "compile",
    "deterministic",
)

COMPILE_FROM = 1000  # steps that pay for the compiler on a CPU
LOADERS = ("torchvision", "ffcv")  # of data sets that are folders of images; the others are arrays in memory
LOOK_AT_ALL = ("guard", "mean_batch", "var_batch")  # options by which a layer looks at the whole batch at once
FLAGS = ("learn_gain", "mixture", "relu", "first_unbiased")  # options that are on or off
# What a configuration of these groups has; a key that is added by "+" beside them would do nothing.
GROUPS = {
    "norm": {"name", "preset", "predictor", "options"},
    "batch": {"grad_batch", "stat_batch"},
    "budget": {"name", "epochs", "warmup", "subset", "size", "stop_at_chance", "stop_after"},
}
UNREADABLE = ("fail", "skip")  # what becomes of a run whose image folder has files that cannot be read


def conf_dir() -> Path:
    """conf/ of the checkout; inside the package where it was installed from a wheel."""
    package = Path(__file__).resolve().parents[1]
    candidates = (package / "conf", package.parents[1] / "conf")
    found = next((c for c in candidates if (c / "config.yaml").exists()), None)
    if found is None:
        raise UserError(f"no configuration found: looked for config.yaml in {' and '.join(map(str, candidates))}")
    return found


def compose(overrides: list[str], among_many: bool = False) -> Config:
    """The configuration of one run, as plain values. `among_many`: it is one of many (composition.py).

    UserError: unknown names or values, impossible combinations.
    """
    config = composition.compose(conf_dir(), overrides, among_many)
    config["dataset"].pop("budgets")  # the chosen one stands under `budget`
    _resolve(config)
    _check(config)
    return config


def result_part(config: Config) -> Config:
    """What determines the result."""
    return {key: config[key] for key in RESULT_KEYS}


def describe(config: Config) -> str:
    """A run in one line."""
    names = " ".join(config[group]["name"] for group in ("dataset", "arch", "norm"))
    return f"{names} {batches(config)} {config['budget']['name']} seed {config['seed']}"


def batches(config: Config) -> str:
    """(images a step, images that share statistics); - where a normalizer has none of a batch."""
    return f"({config['batch']['grad_batch']},{config['batch']['stat_batch'] or '-'})"


def check_batches(config: Config, devices: int) -> None:
    """UserError unless every device, and every micro-batch there, gets whole statistics groups."""
    grad, stat, parts = config["batch"]["grad_batch"], config["batch"]["stat_batch"], config["accumulate"]
    name = config["norm"]["name"]
    if not _is_count(parts, 1):
        raise UserError(f"accumulate = {parts}: expected a positive number of micro-batches")
    where = f"{devices} devices" + (f" x accumulate = {parts}" if parts > 1 else "")
    if grad % (devices * parts):
        raise UserError(f"batch.grad_batch = {grad} does not divide among {where}")
    if name in BATCH_STATISTICS and name not in SPAN_DEVICES and (grad // (devices * parts)) % stat:
        raise UserError(
            f"batch.grad_batch = {grad} on {where}: {grad // (devices * parts)} images each are no whole groups of "
            f"batch.stat_batch = {stat}, and a group cannot span devices; take fewer devices"
        )
    whole = [key for key in LOOK_AT_ALL if config["norm"]["options"].get(key) is not None]
    if parts > 1 and (name in SPAN_DEVICES or whole):
        what = name if name in SPAN_DEVICES else f"norm.options.{whole[0]}"
        raise UserError(
            f"accumulate = {parts}: {what} looks at the whole batch, which micro-batches do not see at once"
        )


def _resolve(config: Config) -> None:
    """Fill in what `auto` and null stand for, so that the record says what ran."""
    for group, keys in GROUPS.items():
        for key in config[group].keys() - keys:
            raise UserError(nearest(f"{group}.{key}", sorted(f"{group}.{known}" for known in keys), "setting"))
    options = config["norm"]["options"]
    _expect(isinstance(options, dict), "norm.options", options, "settings of its own, such as norm.options.gain=0.5")
    config["device"] = _device(config["device"])
    on_gpu = config["device"].startswith("cuda")
    detects = config["dataset"].get("task") == "detection"
    fast = on_gpu or (machine.multiplies_bfloat16() and not detects)
    if config["precision"] == "auto":
        config["precision"] = "bf16" if fast else "fp32"
    if config["compile"] == "auto":
        # A detector's batches have a shape of their own each. On a CPU the compiler takes a minute, and a C++ compiler.
        pays = on_gpu or (_steps(config) >= COMPILE_FROM and shutil.which(os.environ.get("CXX", "g++")) is not None)
        config["compile"] = fast and not detects and pays
    if config["dataset"].get("classes") == "auto":
        from kalmannorm import data

        config["dataset"]["classes"] = data.folder.count_classes(data.root(config["data"]), config["dataset"])
    if detects:
        _resolve_detection(config)
    elif config["weights"] is not None:
        raise UserError(f"weights = {config['weights']}: only arch=mask_rcnn_c4 and _fpn begin with given weights")
    norm, batch = config["norm"], config["batch"]
    if norm["name"] not in BATCH_STATISTICS:
        batch["stat_batch"] = None  # means nothing there: one run serves every column
    elif batch["stat_batch"] is None or norm["name"] in WHOLE_BATCH:
        batch["stat_batch"] = batch["grad_batch"]
    if norm["name"] in KALMAN:
        given = {key: value for key, value in norm["options"].items() if value is not None}
        try:
            norm["options"] = preset_options(norm["preset"], norm["name"], batch["stat_batch"], given)
        except ValueError as error:
            raise UserError(f"norm.preset: {error}") from None
        norm["predictor"] = norm["predictor"] or PRESETS[norm["preset"]]["predictor"]


def _resolve_detection(config: Config) -> None:
    """What the given weights are, by content; a run that has none trains from scratch."""
    arch, file = config["arch"], config["weights"]
    arch["pretrained"] = None
    if file is not None:
        try:
            with Path(file).expanduser().open("rb") as stream:
                arch["pretrained"] = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise UserError(
                f"weights = {file}: {error.strerror or error}; expected a .pth or .safetensors file"
            ) from None
    if arch.get("frozen_stages") is None:
        arch["frozen_stages"] = 0 if file is None else 2


def _steps(config: Config) -> float:
    """About how many steps the run has; of a data set whose size the configuration does not know, many."""
    budget, published = config["budget"], config["dataset"].get("published")
    images = budget["subset"] or (published[0] if published else math.inf)
    return min(float(budget["epochs"] * images / config["batch"]["grad_batch"]), budget.get("stop_after", math.inf))


def _device(asked: str) -> str:
    if asked != "auto":
        return asked
    return "cuda" if machine.has_gpu() else "cpu"


def _is_count(value: object, least: int) -> bool:
    """Whether it is a whole number from `least`; true and false, which Python counts as 1 and 0, are none."""
    return type(value) is int and value >= least


def _check(config: Config) -> None:
    batch, budget = config["batch"], config["budget"]
    grad, stat = batch["grad_batch"], batch["stat_batch"]
    _expect(config["precision"] in ("fp32", "bf16"), "precision", config["precision"], "fp32, bf16 or auto")
    _expect(isinstance(config["compile"], bool), "compile", config["compile"], "true, false or auto")
    _expect(_is_count(config["seed"], 0) and config["seed"] < 2**63, "seed", config["seed"], "an integer from 0")
    _expect(_is_count(grad, 1), "batch.grad_batch", grad, "a positive number of images")
    if stat is not None:
        _expect(_is_count(stat, 1), "batch.stat_batch", stat, "a positive number of images, or null")
        _expect(stat <= grad, "batch.stat_batch", stat, f"at most batch.grad_batch = {grad}")
        _expect(grad % stat == 0, "batch.grad_batch", grad, f"a multiple of batch.stat_batch = {stat}")
    for key in ("epochs", "size"):
        _expect(_is_count(budget[key], 1), f"budget.{key}", budget[key], "a positive integer")
    warmup, patience = budget["warmup"], budget["stop_at_chance"]
    _expect(warmup is None or (_is_number(warmup) and 0 <= warmup < budget["epochs"]), "budget.warmup", warmup,
            f"null or epochs from 0, below budget.epochs = {budget['epochs']}")  # fmt: skip
    _expect(patience is None or _is_count(patience, 1), "budget.stop_at_chance", patience,
            "null or a number of epochs")  # fmt: skip
    _expect(_is_count(budget.get("stop_after", 1), 1), "budget.stop_after", budget.get("stop_after"),
            "a number of steps of the first epoch")  # fmt: skip
    subset = budget["subset"]
    _expect(subset is None or _is_count(subset, grad), "budget.subset", subset,
            f"null or at least one step's {grad} images")  # fmt: skip
    dataset, workers = config["dataset"], config["workers"]
    if "loader" in dataset:
        _expect(dataset["loader"] in LOADERS, "dataset.loader", dataset["loader"],
                " or ".join(LOADERS))  # fmt: skip
        _expect(dataset["unreadable"] in UNREADABLE, "dataset.unreadable", dataset["unreadable"],
                " or ".join(UNREADABLE))  # fmt: skip
    _expect(workers == "auto" or _is_count(workers, 0), "workers", workers,
            "auto or a number of processes")  # fmt: skip
    width = config["arch"].get("width", 1)
    _expect(_is_number(width) and width > 0, "arch.width", width, "a factor above 0")
    options = config["norm"]["options"]
    for key, value in (
        ("deterministic", config["deterministic"]),
        ("dataset.flip", dataset.get("flip", False)),
        *((f"norm.options.{key}", options.get(key, False)) for key in FLAGS),
    ):
        _expect(isinstance(value, bool), key, value, "true or false")
    noise = options.get("noise", False)
    _expect(isinstance(noise, bool) or noise in ("shared", "relative"), "norm.options.noise", noise,
            "true, false, shared or relative")  # fmt: skip
    _check_schedule(config["schedule"])
    if "input_belief" in options:
        _expect(options["input_belief"] == "data", "norm.options.input_belief", options["input_belief"],
                "data, measured from the training set, or nothing at all")  # fmt: skip
    if options.get("gain") == 1 and options.get("learn_gain"):
        raise UserError(
            "norm.options.gain = 1 cannot be learned: pass norm.options.learn_gain=false, or a gain below 1"
        )


def _check_schedule(schedule: Config) -> None:
    """Rates are one number where the schedule decays it by itself, else [[last epoch, rate], ...]."""
    lr, momentum, decay = schedule["lr"], schedule["momentum"], schedule["weight_decay"]
    if "decay" in schedule or "of_steps" in schedule:
        _expect(_is_number(lr) and lr > 0, "schedule.lr", lr, "a rate above 0")
    else:
        whole = isinstance(lr, list) and lr and all(isinstance(pair, list) and len(pair) == 2 for pair in lr)
        _expect(bool(whole) and all(_is_number(part) and part > 0 for pair in lr for part in pair),
                "schedule.lr", lr, "[[last epoch, rate], ...], for example [[30,0.1],[60,0.01]]")  # fmt: skip
    _expect(_is_number(momentum) and 0 <= momentum < 1, "schedule.momentum", momentum, "a number from 0, below 1")
    _expect(_is_number(decay) and decay >= 0, "schedule.weight_decay", decay, "a number from 0")


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def _expect(condition: bool, key: str, value: object, expected: str) -> None:
    if not condition:
        raise UserError(f"{key} = {value}: expected {expected}")
