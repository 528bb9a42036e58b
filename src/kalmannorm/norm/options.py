"""Checks of a normalizer's options: the error about an unknown one names those that exist."""

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
    """An unknown option: a ValueError, like every bad option, and a TypeError, as Python raises for it."""


def options_of(build: Callable[..., Any]) -> list[str] | None:
    """Return the names of the options of a class, or of a function that builds one; None if it takes any.

    Its own, and those of what it passes **options to: a class's bases, or its `hands_on`.
    """
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
    """Raise UnknownOption if `given` has an option that neither `build` nor `more` has; `of` begins the message."""
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
    """Raise ValueError unless `value` is of the annotated `kind`; kinds not in _KINDS are not checked."""
    kinds, wanted = _KINDS.get(kind, ((object,), ""))
    if not isinstance(value, kinds):
        raise ValueError(f"{of}: {name} must be {wanted}, not {value!r}")


def _refusing(build: Callable[..., Any], call: Build) -> Build:
    """Wrap `call`, the constructor of the class `build` or the function itself, with checks of its options."""
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
    """Base of the normalizers: their constructors refuse unknown options."""

    __class__ = own_class
    __call__ = or_leaf(nn.Module.__call__)
    layer_name = ""  # set by convert: errors name the layer

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        if "__init__" in vars(cls):
            cls.__init__ = _refusing(cls, cls.__init__)  # type: ignore[method-assign]


def hands_on(kind: Callable[..., Any], *fixed: str) -> Callable[[Build], Build]:
    """Decorate a function that builds a `kind` and passes it all options but the `fixed` ones."""

    def mark(build: Build) -> Build:
        build.hands_on, build.fixed = kind, fixed  # type: ignore[attr-defined]
        return _refusing(build, build)

    return mark
