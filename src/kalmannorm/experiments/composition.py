"""conf/ and overrides to plain values: Hydra composes.

Hydra takes a tenth of a second for a configuration, and a report has hundreds of them, of a few dozen files: the groups
are composed once each and put together here. What is more than choices of groups and changes of settings, or is
wrong, is left to Hydra as a whole.
"""

import copy
import functools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kalmannorm.errors import UserError, nearest

if TYPE_CHECKING:
    from omegaconf import DictConfig

Values = dict[str, Any]
# Settings that are places of files. Their values are no part of Hydra's grammar, in which 2024 is a number and "=", "("
# and a blank mean something: what stands behind the first "=" is the path, "~" is home.
PATHS = ("data", "results", "runs", "weights")
OPTIONAL = ("data", "weights")  # of them, those that null leaves to their default


def compose(conf: Path, overrides: Sequence[str], among_many: bool = False) -> Values:
    """Return the configuration of conf/config.yaml under the overrides, interpolations resolved.

    `among_many`: it is one of many, which have most of their groups in common. For a single one that would take longer.
    UserError: what Hydra refuses, in one line; a choice that does not exist, with the nearest that does; a setting that
    is given twice.
    """
    refuse_repeated(overrides)
    paths, rest = split_paths(overrides)
    for override in rest:
        _check_choice(conf, override)
    composed = _of_parts(conf, rest) if among_many else None
    return (_by_hydra(conf, rest) if composed is None else composed) | paths


def refuse_repeated(overrides: Sequence[str]) -> None:
    """Raise UserError for a key that is given twice: which of the two is meant?"""
    known: dict[str, str] = {}
    for override in overrides:
        key = override.partition("=")[0].lstrip("+~")
        if key in known and "=" in override:
            raise UserError(f"{key} is given twice, {known[key]!r} and {override!r}: expected it once")
        known[key] = override


def split_paths(overrides: Sequence[str]) -> tuple[dict[str, str | None], list[str]]:
    """Return the values of PATHS that are given, and the other overrides. UserError: no path."""
    paths: dict[str, str | None] = {}
    rest = []
    for override in overrides:
        key, equals, text = override.partition("=")
        if (key := key.lstrip("+")) in PATHS and equals:
            paths[key] = _path(key, text)
        else:
            rest.append(override)
    return paths, rest


def _path(key: str, text: str) -> str | None:
    """Return the path as it is, without quotes around the whole of it."""
    if text == "null" and key in OPTIONAL:
        return None
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    path = text[1:-1] if quoted else text
    if not path or (path == "null" and not quoted):
        expected = f"""a path; one that is called null in quotes: {key}='"null"'"""
        raise UserError(f"{key} = {text or 'nothing'}: expected {expected}")
    return os.path.expanduser(path)  # noqa: PTH111, which raises where nobody has such a home


def _of_parts(conf: Path, overrides: Sequence[str]) -> Values | None:
    """Return what Hydra would compose, from groups that it composed before; None where that is for Hydra to say."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import OverrideType
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException:
        return None
    names = [override.key_or_group for override in parsed]
    if len(set(names)) < len(names) or not all(
        override.type is OverrideType.CHANGE and override.package is None and not override.is_sweep_override()
        for override in parsed
    ):
        return None
    chosen = {name: override.value() for name, override in zip(names, parsed, strict=True) if (conf / name).is_dir()}
    values = copy.deepcopy(_unresolved(conf, ()))
    for group, option in chosen.items():
        values[group] = copy.deepcopy(_unresolved(conf, (f"{group}={option}",))[group])
    whole = OmegaConf.create(values, flags={"struct": True})
    try:
        for name, override in zip(names, parsed, strict=True):
            if name not in chosen:
                OmegaConf.update(whole, name, override.value(), merge=True)
        return _plain(whole, resolve=True)
    except OmegaConfBaseException:
        return None


@functools.cache
def _unresolved(conf: Path, overrides: tuple[str, ...]) -> Values:
    return _by_hydra(conf, overrides, resolve=False)


def _by_hydra(conf: Path, overrides: Sequence[str], resolve: bool = True) -> Values:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        with initialize_config_dir(str(conf), version_base="1.3"):
            return _plain(hydra_compose("config", list(overrides)), resolve)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_explain(error, overrides)) from None


def _plain(config: "DictConfig", resolve: bool) -> Values:
    from omegaconf import OmegaConf

    values = OmegaConf.to_container(config, resolve=resolve)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _check_choice(conf: Path, override: str) -> None:
    """Raise UserError for group=name with a name that does not exist, and offer the nearest."""
    group, equals, name = override.partition("=")
    if not group or not equals:
        raise UserError(f"override {override!r}: expected key=value, for example seed=2 or norm=bn")
    if group.lstrip("+~").split(".")[0].split("/")[0] == "hydra":
        raise UserError(f"override {override!r}: Hydra composes here and runs nothing; results= and runs= say where to")
    if (conf / group).is_dir() and name not in (names := sorted(p.stem for p in (conf / group).glob("*.yaml"))):
        raise UserError(nearest(name, names, group))


def _explain(error: Exception, overrides: Sequence[str]) -> str:
    """Give Hydra's message in one line that names the override."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    for override in overrides:
        try:
            parser.parse_override(override)
        except HydraException as unreadable:
            return f"override {override!r}: {str(unreadable).splitlines()[0]}"
    text = " ".join(str(error).split())
    if match := re.search(r"Could not override '([^']+)'", text):
        key = match[1]
        override = next((o for o in overrides if o.lstrip("+~").startswith(f"{key}=")), key)
        return f"override {override!r}: there is no setting {key!r}; see conf/ for what there is"
    return f"configuration: {text}"
