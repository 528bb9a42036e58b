"""Define the settings of one run by group, each with its type and range, which pydantic checks.

A UserError names the setting, its value and what was expected. Values are converted to their type, so that 1 and 1.0
give the same id. The id is a hash of `values()`, which leaves out a setting that has the default null and is null.
"""

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, fields
from pathlib import PurePath
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    TypeAdapter,
    ValidationError,
    model_validator,
    with_config,
)
from pydantic.dataclasses import dataclass
from pydantic_core import ArgsKwargs
from typing_extensions import TypedDict  # pydantic takes Python's own from 3.12 on

from kalmannorm.errors import UserError, nearest

STRICT = ConfigDict(strict=True, allow_inf_nan=False, extra="forbid")


def _whole(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


Int = Annotated[int, BeforeValidator(_whole)]
Number = Annotated[int | float, BeforeValidator(_whole)]  # 2.0 becomes the int 2
Float = Annotated[float, AfterValidator(lambda value: value + 0.0)]  # -0.0 becomes 0.0
Positive = Annotated[Int, Field(gt=0)]
Natural = Annotated[Int, Field(ge=0)]
Rate = Annotated[Float, Field(gt=0)]
Share = Annotated[Float, Field(ge=0, le=1)]
Part = Annotated[Float, Field(gt=0, le=1)]
Name = Annotated[str, Field(min_length=1)]
Pair = Annotated[list[Positive], Field(min_length=2, max_length=2)]
Channels = Field(min_length=3, max_length=3)  # one number per channel
Factors = Annotated[list[Annotated[Float, Field(gt=0, le=16)]], Field(min_length=1)]
Blocks = Annotated[Int, Field(ge=1, le=100)]
Upto4096 = Annotated[Int, Field(ge=1, le=4096)]


@with_config(STRICT)
class ArchOptions(TypedDict, total=False):
    """The options of all networks; each builder refuses those that are not its own."""

    pretrained: str | None  # the sha256 of weights=FILE
    width: Annotated[Float, Field(gt=0, le=64)]
    hidden: Annotated[Int, Field(ge=0, le=10**5)]
    layers: Annotated[list[Blocks], Field(min_length=4, max_length=4)]
    strides: Annotated[list[Annotated[Int, Field(ge=1, le=8)]], Field(min_length=3, max_length=3)]
    dropout: Annotated[Float, Field(ge=0, lt=1)]
    frozen_stages: Annotated[Int, Field(ge=0, le=4)] | None  # 2: the stem and layer1
    max_size: Annotated[Int, Field(ge=8, le=10**4)]
    boxes: Annotated[Int, Field(ge=1, le=10**4)]
    roi_size: Annotated[Int, Field(ge=1, le=64)]
    head_norm: Literal["none", "bn", "gn", "ln", "in", "sn", "bkn"]  # in a detector's pyramid and heads
    mask_head: bool
    roi_belief: Literal["end", "carry"]
    proposals: Pair | None  # in training, in evaluation
    candidates: Pair | None
    # Options of torchvision's ResNets.
    zero_init_residual: bool
    groups: Upto4096
    width_per_group: Upto4096
    replace_stride_with_dilation: Annotated[list[bool], Field(min_length=3, max_length=3)]


@with_config(STRICT)
class NormOptions(TypedDict, total=False):
    """The options of all normalizers; each builder refuses those that are not its own, and words that it does not
    know."""

    learn_gain: bool | None
    mixture: bool | None
    relu: bool | None
    first_unbiased: bool | None
    moving_unbiased: bool | None
    affine: bool | None
    bias: bool | None
    belief: str | None
    predict: str | None
    transition: str | None
    placement: str | None
    moving_groups: str | None
    ragged: str | None
    mean_batch: str | None
    var_batch: str | None
    first: str | None
    first_face: str | None
    mixed: list[str]
    in_unbiased: bool
    average: str | None
    estimator: str | None
    gain: Part | None
    prior_values: Rate | None
    guard: Annotated[int | float, Field(gt=0)] | None  # int and float stay apart: recorded ids have both
    gamma_cap: Rate | None
    gamma_decay: Annotated[list[Number | str], Field(min_length=2, max_length=2)] | None  # [variant, number]
    ratio: Share
    group: Positive
    iterations: Annotated[Int, Field(ge=1, le=100)]
    rmax: Annotated[Float, Field(ge=1)]
    dmax: Annotated[Float, Field(ge=0)]
    weights: dict[str, Any]  # WeightOptions
    eps: Part | None
    momentum: Share | None
    num_groups: Positive | None
    max_groups: Positive | None
    noise: bool | Literal["shared", "relative"] | None
    input_belief: Literal["data"] | None  # measured from the training set


class _Refreshes(TypedDict):
    kind: str
    momentum: Literal["transform", "zero"]
    every: Positive
    samples: Positive


@with_config(STRICT)
class WeightOptions(_Refreshes, total=False):
    """norm.options.weights: the options of whitened weights; the optional ones belong to some kinds only."""

    covariance: Literal["measured", "predicted"]
    eps: Rate
    outer_eps: Rate
    share: Part


# Options of networks that are newer than recorded runs: at these values they are left out of the id.
OMITTED_DEFAULTS = {"head_norm": "none", "mask_head": True}
# Options that every builder takes -> the normalizers that do not use them.
UNUSED_OPTIONS = {"momentum": ("gn", "ln", "in", "gkn", "frozen", "wn", "none"), "eps": ("wn", "none")}


def expect(condition: bool, key: str, value: object, expected: str) -> None:
    """Raise UserError unless the condition holds."""
    if not condition:
        raise UserError(f"{key} = {value}: expected {expected}")


@contextmanager
def _explained(values: Mapping[str, Any], known: Iterable[str], group: str) -> Iterator[None]:
    """Turn pydantic's errors into a UserError: an unknown setting, a missing one, or a value out of range."""
    try:
        yield
    except ValidationError as error:
        prefix, every = f"{group}." if group else "", error.errors(include_url=False)
        for one in every:
            if one["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
                raise unknown(str(one["loc"][0]), known, prefix) from None
        name = str(every[0]["loc"][0])
        if every[0]["type"] == "missing":
            raise UserError(f"{prefix}{name} is missing") from None
        said = [one["msg"].partition(" should ")[2] for one in every if one["loc"][0] == name]
        words = " or ".join(dict.fromkeys(f"to {words.partition(' after validation')[0]}" for words in said))
        words = words.replace("a valid boolean", "true or false")
        raise UserError(f"{prefix}{name} = {values[name]}: expected {words}") from None


def unknown(key: str, known: Iterable[str], prefix: str) -> UserError:
    """Return the error for an unknown setting; it names the nearest known one."""
    return UserError(nearest(f"{prefix}{key}", sorted(f"{prefix}{name}" for name in known), "setting"))


def checked(kind: Any, values: Mapping[str, Any], group: str) -> Any:
    """Return the options converted to the types of a TypedDict, `kind`. UserError: an unknown option, a bad value."""
    with _explained(values, kind.__annotations__, group):
        return _adapter(kind).validate_python(values)


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def ascending(values: list[Any]) -> bool:
    return all(a < b for a, b in itertools.pairwise(values))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Group:
    """Base class of the groups of settings."""

    GROUP: ClassVar[str] = ""  # its name in conf/

    @model_validator(mode="wrap")
    @classmethod
    def _explain(cls, given: ArgsKwargs, check: ModelWrapValidatorHandler[Self]) -> Self:
        """Raise UserError for a bad setting, however the group is made; inside another group, that one raises it."""
        if not isinstance(given, ArgsKwargs):
            return check(given)
        with _explained(given.kwargs or {}, [one.name for one in fields(cls)], cls.GROUP):
            return check(given)

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Self:
        """Make the group from plain values. UserError: an unknown, missing or bad setting."""
        return cls(**{str(key): value for key, value in values.items()})

    def values(self) -> dict[str, Any]:
        """Return the settings as plain values, as conf/ and records hold them."""
        every = ((one, getattr(self, one.name)) for one in fields(self))
        return {one.name: value for one, value in every if value is not None or one.default is MISSING}


# The groups ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Dataset(Group):
    """The settings that all data sets have."""

    GROUP: ClassVar[str] = "dataset"
    name: Name
    classes: Positive
    published: Pair | None  # training images, test images


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ArrayDataset(Dataset):
    """Small images, in memory as arrays."""

    published: Pair | None = None
    pad: Annotated[Int, Field(ge=0, lt=32)]  # pixels
    flip: bool
    recolour: bool | None = None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FilesDataset(Dataset):
    """A folder of files, one folder a class."""

    folder: Annotated[Name, AfterValidator(lambda folder: str(PurePath(folder)))]  # under the data root; a/ is a
    flip: bool
    mean: Annotated[list[Share], Channels]
    std: Annotated[list[Rate], Channels]
    gap_images: Positive


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FolderDataset(FilesDataset):
    """Images as files."""

    loader: Literal["torchvision", "ffcv"]
    unreadable: Literal["fail", "skip"]  # what a run does about unreadable files


@dataclass(frozen=True, kw_only=True, config=STRICT)
class VideoDataset(FilesDataset):
    """Videos as files."""

    frames: Annotated[Int, Field(ge=1, le=512)]
    interval: Annotated[Int, Field(ge=1, le=64)]  # frames
    views: Annotated[Int, Field(ge=1, le=100)]  # clips


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CocoDataset(Dataset):
    """Images with boxes and masks of objects, in COCO's format."""

    published: Pair | None = None
    task: Literal["detection"]
    steps: Positive | None
    train_images_evaluated: Natural


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SegmentationDataset(Dataset):
    """Scenes with a label map each."""

    published: Pair
    task: Literal["segmentation"]
    crop: Pair  # height, width of training crops, in pixels
    scales: Factors  # of the short side in training
    test_scales: Factors  # of the short side in multi-scale evaluation
    flip: bool
    mean: Annotated[list[Share], Channels]
    std: Annotated[list[Rate], Channels]
    other: Name | None = None  # a second test set, with the same classes


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Arch(Group):
    """A network, with the options of its builder, which refuses unknown ones."""

    GROUP: ClassVar[str] = "arch"
    name: Name
    options: dict[str, Any]

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Self:
        options = checked(ArchOptions, {key: value for key, value in values.items() if key != "name"}, "arch")
        given = {key: value for key, value in options.items() if OMITTED_DEFAULTS.get(key, ...) != value}
        return cls(name=values["name"], options=given)

    def values(self) -> dict[str, Any]:
        return {"name": self.name, **self.options}


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Norm(Group):
    """A normalizer with the options of its builder; preset and predictor if it is a Kalman normalizer."""

    GROUP: ClassVar[str] = "norm"
    name: Name
    preset: str | None
    predictor: str | None
    options: dict[str, Any]

    def __post_init__(self) -> None:
        options = checked(NormOptions, self.options, "norm.options")
        if "weights" in options:
            options["weights"] = checked(WeightOptions, options["weights"], "norm.options.weights")
        if options.get("gain") == 1 and options.get("learn_gain"):
            raise UserError(
                "norm.options.gain = 1 cannot be learned: pass norm.options.learn_gain=false, or a gain below 1"
            )
        for key, names in UNUSED_OPTIONS.items():
            given = options.get(key)
            unread = given is not None and self.name in names
            expect(not unread, f"norm.options.{key}", given, f"none: {self.name} has no use for it")
        object.__setattr__(self, "options", options)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Batch(Group):
    """Numbers of images per optimizer step, and of images that share statistics (null: all of the step)."""

    GROUP: ClassVar[str] = "batch"
    grad_batch: Positive
    stat_batch: Positive | None

    def __post_init__(self) -> None:
        grad, stat = self.grad_batch, self.stat_batch
        if stat is not None:
            expect(stat <= grad, "batch.stat_batch", stat, f"at most batch.grad_batch = {grad}")
            expect(grad % stat == 0, "batch.grad_batch", grad, f"a multiple of batch.stat_batch = {stat}")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SGD(Group):
    """The settings that all schedules have."""

    GROUP: ClassVar[str] = "schedule"
    name: Name
    epochs: Positive | None = None
    momentum: Annotated[Float, Field(ge=0, lt=1)]
    weight_decay: Share


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Schedule(SGD):
    """Learning rates of a classifier.

    `lr` is [[last epoch, rate], ...], where the last epoch is the length of the run; with `decay`, the one rate from
    which it decays to 0. `lr_batch`: the number of images per step for which the rates are meant.
    """

    lr: list[list[Number]] | Float
    decay: Literal["linear", "cosine", "poly"] | None = None
    lr_batch: Positive | None = None

    def __post_init__(self) -> None:
        if self.decay is not None:
            expect(isinstance(self.lr, float) and self.lr > 0, "schedule.lr", self.lr, "a rate above 0")
            return
        pairs = "[[last epoch, rate], ...], epochs in ascending order, for example [[30,0.1],[60,0.01]]"
        rates = self.lr if isinstance(self.lr, list) else []
        right = bool(rates) and all(len(pair) == 2 and min(pair) > 0 for pair in rates)
        expect(right and ascending([epoch for epoch, _ in rates]), "schedule.lr", self.lr, pairs)
        object.__setattr__(self, "lr", [[epoch, float(rate)] for epoch, rate in rates])

    @property
    def milestones(self) -> list[list[Number]]:
        """`lr`, for a schedule without `decay`."""
        assert isinstance(self.lr, list)
        return self.lr

    @property
    def peak(self) -> float:
        """The highest rate."""
        return float(max(rate for _, rate in self.milestones)) if isinstance(self.lr, list) else self.lr


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DetectionSchedule(SGD):
    """Learning rates of a detector, for a run of `of_steps` steps with `of_batch` images each."""

    of_steps: Positive
    lr: Rate
    of_batch: Positive
    warmup: Natural  # steps
    drops: list[Positive]  # steps after which the rate is a tenth

    def __post_init__(self) -> None:
        expect(ascending(self.drops), "schedule.drops", self.drops, "steps in ascending order")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Budget(Group):
    """How much of an experiment is run: epochs, number of images and resolution."""

    GROUP: ClassVar[str] = "budget"
    name: Name
    epochs: Positive
    warmup: Annotated[Number, Field(ge=0)] | None  # epochs
    subset: Positive | None  # images
    size: Annotated[Int, Field(ge=2, le=4096)]  # pixels
    stop_at_chance: Positive | None  # epochs
    stop_after: Positive | None = None  # steps of the first epoch

    def __post_init__(self) -> None:
        expect(self.warmup is None or self.warmup < self.epochs, "budget.warmup", self.warmup,
               f"null or epochs from 0, below budget.epochs = {self.epochs}")  # fmt: skip


DATASET_CLASSES: dict[str, type[Dataset]] = {"detection": CocoDataset, "segmentation": SegmentationDataset}


def read_dataset(values: Mapping[str, Any]) -> Dataset:
    """Return the settings of a data set as the class for its kind. UserError: an unknown task, a bad setting."""
    if "task" in values:
        if values["task"] not in DATASET_CLASSES:
            task = nearest(str(values["task"]), DATASET_CLASSES, "task")
            raise UserError(f"dataset.task is {values['task']!r}, expected a task: {task}")
        return DATASET_CLASSES[values["task"]].read(values)
    kind = VideoDataset if "frames" in values else FolderDataset if "loader" in values else ArrayDataset
    return kind.read(values)


def read_schedule(values: Mapping[str, Any]) -> Schedule | DetectionSchedule:
    """Return the settings of a schedule as the class for its kind. UserError: a bad setting."""
    return DetectionSchedule.read(values) if "of_steps" in values else Schedule.read(values)
