"""The settings of one run by group, each with its type, and the words for what is expected of it.

A group is a frozen dataclass that checks itself: a UserError names the setting, its value and what was expected. Values
are brought to their type, so that 1 and 1.0 of a setting are one value and one id. What a run's id is made of is
`values()`; a setting that is optional is not in it where it is not set.
"""

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import PurePath
from types import UnionType
from typing import Any, ClassVar, Self, get_args, get_origin, get_type_hints

from kalmannorm.errors import UserError, nearest

Number = int | float  # a whole number is an int here, however it was written
LOADERS = ("torchvision", "ffcv")  # of data sets that are folders of images; the others are arrays in memory
UNREADABLE = ("fail", "skip")  # what becomes of a run whose image folder has files that cannot be read
DECAYS = ("linear", "cosine", "poly")
HEAD_NORMS = ("none", "bn", "gn", "ln", "in", "sn", "bkn")  # of a detector's pyramid and heads
TWO_COUNTS = "null or [in training, in evaluation]"

Check = Callable[[Any], bool]
Options = Mapping[str, tuple[Any, Check, str]]  # by name: the type, what the value has to fulfil, the words for both


def positive(value: float) -> bool:
    return value > 0


def pair_of_counts(two: list[int]) -> bool:
    return len(two) == 2 and min(two) > 0


def anything(value: object) -> bool:
    return True


# All options of networks that a run may have; which of them are whose, their builders know.
OF_ARCH: Options = {
    "pretrained": (str | None, anything, "the sha256 of weights=FILE, or null"),
    "width": (float, lambda value: 0 < value <= 64, "a factor above 0, at most 64"),
    "hidden": (int, lambda value: 0 <= value <= 10**5, "a number of channels from 0 to 100000"),
    "layers": (list[int], lambda four: len(four) == 4 and 1 <= min(four) <= max(four) <= 100, "four numbers of blocks"),
    "strides": (
        list[int],
        lambda three: len(three) == 3 and 1 <= min(three) <= max(three) <= 8,
        "three numbers from 1 to 8",
    ),
    "dropout": (float, lambda value: 0 <= value < 1, "a number from 0, below 1"),
    "frozen_stages": (int | None, lambda value: 0 <= value <= 5, "a number of stages from 0 to 5, or null"),
    "max_size": (int, lambda value: 8 <= value <= 10**4, "a number of pixels from 8 to 10000"),
    "boxes": (int, lambda value: 1 <= value <= 10**4, "a number from 1 to 10000"),
    "roi_size": (int, lambda value: 1 <= value <= 64, "a number from 1 to 64"),
    "head_norm": (str, HEAD_NORMS.__contains__, f"one of {', '.join(HEAD_NORMS)}"),
    "mask_head": (bool, anything, "true or false"),
    "roi_belief": (str, ("end", "carry").__contains__, "end or carry"),
    # torchvision's own
    "zero_init_residual": (bool, anything, "true or false"),
    **dict.fromkeys(("groups", "width_per_group"), (int, lambda value: 1 <= value <= 4096, "a number from 1 to 4096")),
    "replace_stride_with_dilation": (list[bool], lambda three: len(three) == 3, "three of true and false"),
    "proposals": (list[int] | None, pair_of_counts, TWO_COUNTS),
    "candidates": (list[int] | None, pair_of_counts, TWO_COUNTS),
}
# Options of networks that came later than recorded runs: at these values they are no part of an id.
UNSAID = {"head_norm": "none", "mask_head": True}
# All options of normalizers that a run may have; which of them are whose, and what words mean, their builders know.
OF_NORM: Options = {
    **dict.fromkeys(
        ("learn_gain", "mixture", "relu", "first_unbiased", "moving_unbiased", "affine", "bias"),
        (bool | None, anything, "true or false"),
    ),
    **dict.fromkeys(
        ("belief", "predict", "transition", "placement", "moving_groups", "ragged", "mean_batch", "var_batch")
        + ("first", "average", "estimator"),
        (str | None, anything, "a word"),
    ),
    "gain": (float | None, lambda value: 0 < value <= 1, "a number above 0, at most 1, or null"),
    **dict.fromkeys(("prior_values", "guard", "gamma_cap"), (float | None, positive, "a number above 0, or null")),
    "gamma_decay": (list[Number | str] | None, lambda pair: len(pair) == 2, "null or [variant, number]"),
    "ratio": (float, lambda value: 0 <= value <= 1, "a number from 0 to 1"),
    "group": (int, positive, "a whole number from 1"),
    "iterations": (int, lambda value: 1 <= value <= 100, "a whole number from 1 to 100"),
    "rmax": (float, lambda value: value >= 1, "a number from 1"),
    "dmax": (float, lambda value: value >= 0, "a number from 0"),
    "weights": (dict, anything, "settings, as conf/norm/wnn.yaml has them"),
    "eps": (float | None, lambda value: 0 < value <= 1, "a number above 0, at most 1"),
    "momentum": (float | None, lambda value: 0 <= value <= 1, "a number from 0 to 1"),
    **dict.fromkeys(("num_groups", "max_groups"), (int | None, positive, "a whole number from 1")),
    "noise": (
        bool | str | None,
        lambda value: value in (True, False, "shared", "relative"),
        "true, false, shared or relative",
    ),
    "input_belief": (
        str | None,
        lambda value: value == "data",
        "data, measured from the training set, or nothing at all",
    ),
}
OF_WEIGHTS: Options = {  # of norm.options.weights
    "kind": (str, anything, "a word"),
    "momentum": (str, ("transform", "zero").__contains__, "transform or zero"),
    "covariance": (str, ("measured", "predicted").__contains__, "measured or predicted"),
    **dict.fromkeys(("every", "samples"), (int, positive, "a whole number from 1")),
    **dict.fromkeys(("eps", "outer_eps"), (float, positive, "a number above 0")),
    "share": (float, lambda value: 0 < value <= 1, "a number above 0, at most 1"),
}
AS_GIVEN = ("guard",)  # recorded ids have whole numbers of it in both forms
# Options that every builder takes, and these normalizers have no use for.
UNREAD = {"momentum": ("gn", "ln", "in", "gkn", "frozen", "wn", "none"), "eps": ("wn", "none")}


def expect(condition: bool, key: str, value: object, expected: str) -> None:
    """Raise UserError unless the condition holds."""
    if not condition:
        raise UserError(f"{key} = {value}: expected {expected}")


def checked(given: Any, kind: Any, check: Check, key: str, expected: str) -> Any:
    """Return the value in its type. UserError: it is of another, or `check` refuses it; null is for the type to say."""
    try:
        value = typed(given, kind)
    except TypeError:
        raise UserError(f"{key} = {given}: expected {expected}") from None
    expect(value is None or bool(check(value)), key, given, expected)
    return value


def checked_options(given: Mapping[str, Any], known: Options, group: str) -> dict[str, Any]:
    """Return the options in their types; those that are not in `known` as they are. UserError."""
    found = dict(given)
    for key, (kind, check, expected) in known.items():
        if key in given:
            value = checked(given[key], kind, check, f"{group}.{key}", expected)
            found[key] = given[key] if key in AS_GIVEN else value
    return found


def setting(expected: str, check: Check = lambda value: True, optional: bool = False, default: Any = MISSING) -> Any:
    """Declare a setting: the words for what is expected, what its value, if not null, has to fulfil beside its type.

    `optional`: where it is not set, it is null, and not among the group's `values`.
    """
    metadata = {"expected": expected, "check": check, "optional": optional}
    return field(default=None if optional else default, metadata=metadata)


def are_milestones(pairs: list[list[Number]]) -> bool:
    return bool(pairs) and all(len(pair) == 2 and min(pair) > 0 for pair in pairs)


def ascending(values: list[Number]) -> bool:
    return all(a < b for a, b in itertools.pairwise(values))


def not_negative(value: float) -> bool:
    return value >= 0


@dataclass(frozen=True, kw_only=True)
class Group:
    """What all groups of settings have in common."""

    GROUP: ClassVar[str] = ""  # its name in conf/

    def __post_init__(self) -> None:
        """Bring the values to their types and check them. UserError."""
        hints = _hints(type(self))  # type: ignore[arg-type]
        for one in fields(self):
            if "expected" in one.metadata:
                key = f"{self.GROUP}.{one.name}".lstrip(".")
                check, expected = one.metadata["check"], one.metadata["expected"]
                value = checked(getattr(self, one.name), hints[one.name], check, key, expected)
                object.__setattr__(self, one.name, value)

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Self:
        """Make the group from plain values. UserError: an unknown setting, a missing one, a value that cannot be."""
        known = {one.name: one for one in fields(cls)}
        refuse_unknown(values, known, cls.GROUP)
        for name, one in known.items():
            if name not in values and not one.metadata.get("optional"):
                raise UserError(f"{cls.GROUP}.{name} is missing")
        return cls(**values)

    def values(self) -> dict[str, Any]:
        """Return plain values, as they stand in conf/ and in records."""
        return {
            one.name: getattr(self, one.name)
            for one in fields(self)
            if getattr(self, one.name) is not None or not one.metadata.get("optional")
        }


def refuse_unknown(values: Mapping[str, Any], known: Mapping[str, Any], group: str = "") -> None:
    """Raise UserError for a setting that nothing reads, with the nearest that there is."""
    prefix = f"{group}." if group else ""
    for key in values:
        if key not in known:
            raise UserError(nearest(f"{prefix}{key}", sorted(f"{prefix}{name}" for name in known), "setting"))


def typed(value: Any, hint: Any) -> Any:
    """Return the value in the type: of whole numbers, 16 and 16.0 are one. TypeError: it is of another."""
    if get_origin(hint) is UnionType:
        arms = get_args(hint)
        if value is None and type(None) in arms:
            return None
        for arm in arms:
            try:
                return typed(value, arm)
            except TypeError:
                continue
        raise TypeError
    if hint is float and type(value) in (int, float) and math.isfinite(value):
        return float(value) + 0.0  # -0.0 is 0.0
    if hint is int and type(value) is float and value.is_integer():
        return int(value)
    kind = get_origin(hint) or hint
    if type(value) is not kind or kind is float:
        raise TypeError
    if kind is list:
        return [typed(part, get_args(hint)[0]) for part in value]
    return value


@functools.cache
def _hints(group: type[Any]) -> dict[str, Any]:
    return get_type_hints(group)


# The groups ---------------------------------------------------------------------------------------------------------


MEAN = setting("three numbers from 0 to 1, of the channels", lambda m: len(m) == 3 and min(m) >= 0 and max(m) <= 1)
STD = setting("three numbers above 0, of the channels", lambda s: len(s) == 3 and min(s) > 0)


@dataclass(frozen=True, kw_only=True)
class Dataset(Group):
    """What is common to all data sets."""

    GROUP = "dataset"
    name: str = setting("a name", bool)
    classes: int = setting("a number of classes", positive)
    published: list[int] | None = setting("null or [training images, test images]", pair_of_counts, True)


@dataclass(frozen=True, kw_only=True)
class ArrayDataset(Dataset):
    """Small images, in memory as arrays."""

    pad: int = setting("a number of pixels from 0, below 32", lambda value: 0 <= value < 32)
    flip: bool = setting("true or false")
    recolour: bool | None = setting("true or false", optional=True)


@dataclass(frozen=True, kw_only=True)
class FilesDataset(Dataset):
    """A folder of files, one folder a class."""

    published: list[int] | None = setting("null or [training files, test files]", pair_of_counts)
    folder: str = setting("a folder under the data root", bool)
    flip: bool = setting("true or false")
    mean: list[float] = MEAN
    std: list[float] = STD
    gap_images: int = setting("a number of images, or videos", positive)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "folder", str(PurePath(self.folder)))  # a/ is a


@dataclass(frozen=True, kw_only=True)
class FolderDataset(FilesDataset):
    """Images as files."""

    loader: str = setting(" or ".join(LOADERS), LOADERS.__contains__)
    unreadable: str = setting(" or ".join(UNREADABLE), UNREADABLE.__contains__)


@dataclass(frozen=True, kw_only=True)
class VideoDataset(FilesDataset):
    """Videos as files."""

    frames: int = setting("a number of frames from 1 to 512", lambda value: 1 <= value <= 512)
    interval: int = setting("a number of frames from 1 to 64", lambda value: 1 <= value <= 64)
    views: int = setting("a number of clips from 1 to 100", lambda value: 1 <= value <= 100)


@dataclass(frozen=True, kw_only=True)
class CocoDataset(Dataset):
    """Images with boxes and masks of objects, as COCO has them."""

    task: str = setting("detection", lambda task: task == "detection")
    steps: int | None = setting("null or a number of steps", positive)
    train_images_evaluated: int = setting("a number of images from 0", not_negative)


def are_factors(values: list[float]) -> bool:
    return bool(values) and min(values) > 0 and max(values) <= 16


@dataclass(frozen=True, kw_only=True)
class SegmentationDataset(Dataset):
    """Scenes with a label map each."""

    published: list[int] = setting("[training scenes, test scenes]", pair_of_counts)
    task: str = setting("segmentation", lambda task: task == "segmentation")
    crop: list[int] = setting("[height, width] of training crops, in pixels", pair_of_counts)
    scales: list[float] = setting("factors of the short side in training, up to 16", are_factors)
    test_scales: list[float] = setting("factors of the short side in multi-scale evaluation, up to 16", are_factors)
    flip: bool = setting("true or false")
    mean: list[float] = MEAN
    std: list[float] = STD
    other: str | None = setting("another data set of the same classes, on which it is tested as well", bool, True)


@dataclass(frozen=True, kw_only=True)
class Arch(Group):
    """A network, with the options of its builder, which refuses unknown ones."""

    GROUP = "arch"
    name: str = setting("a name", bool)
    options: dict[str, Any]

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_unknown(self.options, OF_ARCH, "arch")
        options = checked_options(self.options, OF_ARCH, "arch")
        said = {key: value for key, value in options.items() if key not in UNSAID or value != UNSAID[key]}
        object.__setattr__(self, "options", said)

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Self:
        return cls(name=values.get("name"), options={key: value for key, value in values.items() if key != "name"})  # type: ignore[arg-type]

    def values(self) -> dict[str, Any]:
        return {"name": self.name, **self.options}


@dataclass(frozen=True, kw_only=True)
class Norm(Group):
    """A normalizer, and what its builder takes; a Kalman one's preset and predictor."""

    GROUP = "norm"
    name: str = setting("a name", bool)
    preset: str | None = setting("the name of a preset, or null")
    predictor: str | None = setting("closed, sampling or null")
    options: dict[str, Any] = setting("settings of its own, such as norm.options.gain=0.5")

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_unknown(self.options, OF_NORM, "norm.options")
        options = checked_options(self.options, OF_NORM, "norm.options")
        if "weights" in options:
            refuse_unknown(options["weights"], OF_WEIGHTS, "norm.options.weights")
            if missing := {"kind", "every", "samples", "momentum"} - options["weights"].keys():
                raise UserError(
                    f"norm.options.weights.{min(missing)} is missing: pass norm=wnn, or all of its settings"
                )
            options["weights"] = checked_options(options["weights"], OF_WEIGHTS, "norm.options.weights")
        if options.get("gain") == 1 and options.get("learn_gain"):
            raise UserError(
                "norm.options.gain = 1 cannot be learned: pass norm.options.learn_gain=false, or a gain below 1"
            )
        for key, names in UNREAD.items():
            given = options.get(key)
            unread = given is not None and self.name in names
            expect(not unread, f"norm.options.{key}", given, f"none: {self.name} has no use for it")
        object.__setattr__(self, "options", options)


@dataclass(frozen=True, kw_only=True)
class Batch(Group):
    """Images of an optimizer step, and images that share statistics (null: all of the step)."""

    GROUP = "batch"
    grad_batch: int = setting("a positive number of images", positive)
    stat_batch: int | None = setting("a positive number of images, or null", positive)

    def __post_init__(self) -> None:
        super().__post_init__()
        grad, stat = self.grad_batch, self.stat_batch
        if stat is not None:
            expect(stat <= grad, "batch.stat_batch", stat, f"at most batch.grad_batch = {grad}")
            expect(grad % stat == 0, "batch.grad_batch", grad, f"a multiple of batch.stat_batch = {stat}")


@dataclass(frozen=True, kw_only=True)
class SGD(Group):
    """What is common to all schedules."""

    GROUP = "schedule"
    name: str = setting("a name", bool)
    epochs: int | None = setting("a positive number of epochs", positive, optional=True)
    momentum: float = setting("a number from 0, below 1", lambda value: 0 <= value < 1)
    weight_decay: float = setting("a number from 0 to 1", lambda value: 0 <= value <= 1)


@dataclass(frozen=True, kw_only=True)
class Schedule(SGD):
    """Learning rates of a classifier.

    `lr` is [[last epoch, rate], ...] of a run whose length is the last of these epochs, or with `decay` one rate, that
    is taken to 0. With `lr_batch` rates are meant for steps of that many images.
    """

    lr: list[list[Number]] | float = setting("a rate above 0, or [[last epoch, rate], ...]")
    decay: str | None = setting(" or ".join(DECAYS), DECAYS.__contains__, optional=True)
    lr_batch: int | None = setting("a positive number of images", positive, optional=True)

    def __post_init__(self) -> None:
        pairs = "[[last epoch, rate], ...], for example [[30,0.1],[60,0.01]]"
        if self.decay is not None:
            checked(self.lr, float, positive, "schedule.lr", "a rate above 0")
        else:
            rates = checked(self.lr, list[list[Number]], are_milestones, "schedule.lr", pairs)
            in_order = ascending([epoch for epoch, _ in rates])
            expect(in_order, "schedule.lr", self.lr, f"{pairs}, epochs in ascending order")
            object.__setattr__(self, "lr", [[epoch, float(rate)] for epoch, rate in rates])
        super().__post_init__()

    @property
    def milestones(self) -> list[list[Number]]:
        """`lr` of a schedule without `decay`."""
        assert isinstance(self.lr, list)
        return self.lr

    @property
    def peak(self) -> float:
        """The highest rate."""
        return float(max(rate for _, rate in self.milestones)) if isinstance(self.lr, list) else self.lr


@dataclass(frozen=True, kw_only=True)
class DetectionSchedule(SGD):
    """Learning rates of a detector, in steps of a run of `of_steps`, for `of_batch` images a step."""

    of_steps: int = setting("a positive number of steps", positive)
    lr: float = setting("a rate above 0", positive)
    of_batch: int = setting("a positive number of images", positive)
    warmup: int = setting("a number of steps from 0", not_negative)
    drops: list[int] = setting(
        "steps in ascending order after which the rate is a tenth",
        lambda drops: ascending(drops) and min(drops, default=1) > 0,
    )


@dataclass(frozen=True, kw_only=True)
class Budget(Group):
    """How much of the experiment is run: its length, images and resolution."""

    GROUP = "budget"
    name: str = setting("a name", bool)
    epochs: int = setting("a positive integer", positive)
    warmup: Number | None = setting("null or a number of epochs from 0", not_negative)
    subset: int | None = setting("null or a positive number of images", positive)
    size: int = setting("a number of pixels from 2 to 4096", lambda value: 2 <= value <= 4096)
    stop_at_chance: int | None = setting("null or a number of epochs", positive)
    stop_after: int | None = setting("a number of steps of the first epoch", positive, optional=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        expect(self.warmup is None or self.warmup < self.epochs, "budget.warmup", self.warmup,
               f"null or epochs from 0, below budget.epochs = {self.epochs}")  # fmt: skip


OF_TASK: dict[str, type[Dataset]] = {"detection": CocoDataset, "segmentation": SegmentationDataset}


def read_dataset(values: Mapping[str, Any]) -> Dataset:
    """Return the data set of the kind that the settings are of."""
    if "task" in values:
        if values["task"] not in OF_TASK:
            task = nearest(str(values["task"]), OF_TASK, "task")
            raise UserError(f"dataset.task is {values['task']!r}, expected a task: {task}")
        return OF_TASK[values["task"]].read(values)
    kind = VideoDataset if "frames" in values else FolderDataset if "loader" in values else ArrayDataset
    return kind.read(values)


def read_schedule(values: Mapping[str, Any]) -> Schedule | DetectionSchedule:
    """Return the schedule of the kind that the settings are of."""
    return DetectionSchedule.read(values) if "of_steps" in values else Schedule.read(values)
