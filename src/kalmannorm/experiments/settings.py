"""Define the settings of one run by group, each with its type and range (schema.py), which pydantic checks."""

from collections.abc import Mapping
from pathlib import PurePath
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass

from kalmannorm.errors import UserError, nearest
from kalmannorm.experiments.schema import (
    OMITTED_DEFAULTS,
    STRICT,
    UNUSED_OPTIONS,
    ArchOptions,
    Channels,
    Factors,
    Float,
    Group,
    Int,
    Name,
    Natural,
    NormOptions,
    Number,
    Pair,
    Positive,
    Rate,
    Share,
    WeightOptions,
    ascending,
    checked,
    expect,
)


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
        pairs = "[[last epoch, rate], ...], epochs ascending, rates above 0, for example [[30,0.1],[60,0.01]]"
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
