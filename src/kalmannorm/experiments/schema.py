"""Define the types of settings, the options of networks and normalizers, and the errors for bad ones.

A UserError names the setting, its value and what was expected. Values are converted to their type, so that 1 and 1.0
give the same id. The id is a hash of `values()`, which leaves out a setting that has the default null and is null.
"""

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, fields
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
