"""Options of normalizers by name: one that does not exist is refused with the names of those that do."""

import functools
import inspect
import numbers
from collections.abc import Callable
from typing import Any, TypeVar, cast

from torch import nn

from kalmannorm.errors import nearest
from kalmannorm.norm.contract import or_leaf, own_class

Build = TypeVar("Build", bound=Callable[..., Any])


class UnknownOption(ValueError, TypeError):
    """ValueError, as of every bad option; TypeError, as Python has it."""


def options_of(build: Callable[..., Any]) -> list[str] | None:
    """What a class, or a function that builds one, knows by name: its own options, and those of what it hands the rest
    to, which is a class's base or what stands in `hands_on`. None: it takes any."""
    names: dict[str, None] = {}
    for constructor in _constructors(build):
        parameters = inspect.signature(constructor).parameters.values()
        names |= dict.fromkeys(p.name for p in parameters if p.kind is p.KEYWORD_ONLY or p.default is not p.empty)
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return list(names)
    rest = getattr(build, "hands_on", None) and options_of(build.hands_on)  # type: ignore[attr-defined]
    fixed = getattr(build, "fixed", ())
    return None if rest is None else list(names | dict.fromkeys(name for name in rest if name not in fixed))


def _constructors(build: Callable[..., Any]) -> list[Callable[..., Any]]:
    bases = inspect.getmro(build) if isinstance(build, type) else ()
    return [vars(base)["__init__"] for base in bases if "__init__" in vars(base)] or [build]


def refuse_unknown(of: str, build: Callable[..., Any], given: dict[str, Any], more: tuple[str, ...] = ()) -> None:
    """UnknownOption: one that `build` does not know, nor is one of `more`."""
    known = options_of(build)
    valid = given if known is None else dict.fromkeys([*known, *more])
    for name in given:
        if name not in valid:
            raise UnknownOption(f"{of}: {nearest(name, valid, 'option')}")


_KINDS: dict[Any, tuple[tuple[type, ...], str]] = {
    float: ((numbers.Real,), "a number"),
    float | None: ((numbers.Real, type(None)), "a number or None"),
    bool: ((bool, int), "True or False"),
    bool | str: ((bool, int, str), "True, False or a word"),
}


def refuse_kind(of: str, name: str, kind: Any, value: object) -> None:
    """ValueError: what is no number or word, where one is wanted."""
    kinds, wanted = _KINDS.get(kind, ((object,), ""))
    if not isinstance(value, kinds):
        raise ValueError(f"{of}: {name} must be {wanted}, not {value!r}")


def _refusing(build: Callable[..., Any], call: Build) -> Build:
    """`call`, a class's constructor or the function itself, for what `build` knows."""
    signature = inspect.signature(call)
    by_place = signature.parameters

    @functools.wraps(call)
    def checked(*args: Any, **options: Any) -> Any:
        name = type(args[0]).__name__ if isinstance(build, type) else build.__name__.strip("_")
        refuse_unknown(name, build, {key: value for key, value in options.items() if key not in by_place})
        for key, value in signature.bind_partial(*args, **options).arguments.items():
            refuse_kind(name, key, by_place[key].annotation, value)
        return call(*args, **options)

    return cast(Build, checked)


class TakesOptions:
    """Base of the normalizers, whose constructors refuse what they do not know."""

    __class__ = own_class
    __call__ = or_leaf(nn.Module.__call__)
    layer_name = ""  # set by convert: errors name the layer

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        if "__init__" in vars(cls):
            cls.__init__ = _refusing(cls, cls.__init__)  # type: ignore[method-assign]


def hands_on(kind: Callable[..., Any], *fixed: str) -> Callable[[Build], Build]:
    """A function that builds a `kind`, which is handed all options but for the fixed ones."""

    def mark(build: Build) -> Build:
        build.hands_on, build.fixed = kind, fixed  # type: ignore[attr-defined]
        return _refusing(build, build)

    return mark
