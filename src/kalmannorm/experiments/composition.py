"""Compose conf/ and overrides, in Hydra's grammar, to plain values: first config.yaml's defaults, then the overrides.

Hydra's own composition takes a tenth of a second, and a report makes hundreds of them from a few dozen files. Here each
file is read once.
"""

import copy
import functools
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kalmannorm.errors import UserError, nearest, reason

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig

Values = dict[str, Any]
# Settings that are paths. They are not parsed by Hydra's grammar, in which 2024 is a number and "=", "(" and blanks
# have a meaning: the path is all that follows the first "=", and "~" is the home folder.
PATHS = ("data", "results", "runs", "weights")
MOST = 10_000  # runs of a sweep, values of an override: more are taken for a typing error
OPTIONAL = ("data", "weights")  # those of PATHS that may be null, for the default


def compose(conf: Path, overrides: Sequence[str]) -> Values:
    """Return the configuration of conf/config.yaml under the overrides, interpolations resolved.

    UserError: an invalid override; a choice that does not exist, with the nearest that does; a setting given twice.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    refuse_repeated(overrides)
    paths, rest = split_paths(overrides)
    for key, path in paths.items():
        if path is not None and any("\ud800" <= letter <= "\udfff" for letter in path):  # bytes that were not decoded
            raise UserError(f"{key} = {path}: this locale has no such letters; call with LC_ALL=C.UTF-8")
    for override in rest:
        _check_choice(conf, override)
    parsed = [parse(override) for override in rest]
    values = copy.deepcopy(_file(conf, "config"))
    chosen = {group: name for choice in values.pop("defaults") if choice != "_self_" for group, name in choice.items()}
    chosen |= {one.key_or_group: one.value() for one in parsed if _chooses(conf, one)}
    values |= {group: copy.deepcopy(_file(conf / group, name)) for group, name in chosen.items()}
    whole = OmegaConf.create(values, flags={"struct": True})
    for one in parsed:
        if not _chooses(conf, one):
            _change(whole, one)
    try:
        resolved: Any = OmegaConf.to_container(whole, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"configuration: {' '.join(str(error).split())}") from None
    return {**resolved, **paths}


def key_of(override: str) -> str:
    """Return the setting that an override changes, adds (+, ++) or deletes (~)."""
    return override.partition("=")[0].lstrip("+~")


def refuse_repeated(overrides: Sequence[str]) -> None:
    """Raise UserError for a key that is given twice, since either value could be meant."""
    known: dict[str, str] = {}
    for override in overrides:
        key = key_of(override)
        if key in known and "=" in override:
            raise UserError(f"{key} is given twice, {known[key]!r} and {override!r}: expected it once")
        known[key] = override


def split_paths(overrides: Sequence[str]) -> tuple[dict[str, str | None], list[str]]:
    """Return the given values of PATHS, and all other overrides. UserError: a value that is no path."""
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
    """Return the path without quotes around it, ~ expanded; None for null. UserError: no path."""
    if text == "null" and key in OPTIONAL:
        return None
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    path = text[1:-1] if quoted else text
    if not path or (path == "null" and not quoted):
        expected = f"""a path; one that is called null in quotes: {key}='"null"'"""
        raise UserError(f"{key} = {text or 'nothing'}: expected {expected}")
    return os.path.expanduser(path)  # noqa: PTH111, which raises where nobody has such a home


@functools.cache
def parse(override: str) -> "Override":
    """Parse an override. UserError: it does not follow Hydra's grammar."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_override(override)
    except HydraException as error:
        text = override.partition("=")[2]
        expected = "expected a number, a word or a list [1,2]"
        raise UserError(f"override {override!r}: {text!r} is no value ({reason(error)}); {expected}") from None


def expand(override: str) -> list[str]:
    """Return the overrides that one with several values stands for (norm=bn,bkn, seed=range(1,4)), at most MOST + 1.

    UserError: it does not follow Hydra's grammar, or names no values (glob).
    """
    from hydra.core.override_parser.types import Glob

    parsed = parse(override)
    if not parsed.is_sweep_override():
        return [override]
    if isinstance(parsed.value(), Glob):
        raise UserError(f"override {override!r}: name the values, as in norm=bn,bkn")
    return [
        f"{parsed.get_key_element()}={value}" for value in itertools.islice(parsed.sweep_string_iterator(), MOST + 1)
    ]


@functools.cache
def _file(folder: Path, name: str) -> Values:
    """Read a file of conf/. Its settings take precedence over those of the files named by its `defaults`."""
    from omegaconf import OmegaConf
    from yaml import YAMLError

    file = folder / f"{name}.yaml"
    try:
        values: Any = OmegaConf.to_container(OmegaConf.load(file))
    except (YAMLError, UnicodeError) as error:
        raise UserError(f"{file} is no YAML: {reason(error)}") from None
    if not isinstance(values, dict):
        raise UserError(f"{file} holds a {type(values).__name__}, expected settings, name: value")
    if name == "config":
        return values
    for other in values.pop("defaults", []):
        values = {**_file(folder, other), **values}
    return values


def choices(folder: Path) -> list[str]:
    """Return the names of a group's files, without hidden ones, which editors and archives leave behind."""
    return sorted(file.stem for file in folder.glob("[!.]*.yaml"))


def _chooses(conf: Path, override: "Override") -> bool:
    plain = not (override.is_add() or override.is_force_add() or override.is_delete() or override.package)
    return plain and (conf / override.key_or_group).is_dir() and not override.is_sweep_override()


def _change(whole: "DictConfig", override: "Override") -> None:
    """Change, add or delete a setting. UserError: it does not exist, or should be added and exists already."""
    from omegaconf import OmegaConf, open_dict
    from omegaconf.errors import OmegaConfBaseException

    said, key, value = f"override {override.input_line!r}", override.key_or_group, override.value()
    if override.is_sweep_override() or override.package is not None:
        raise UserError(f"{said}: expected one value of one setting; --multirun makes a run of each value")
    parent, _, name = key.rpartition(".")
    try:
        if override.is_delete():
            node = OmegaConf.select(whole, parent) if parent else None
            if node is None or name not in node:
                raise UserError(f"{said}: there is no setting {key!r}")
            with open_dict(node):
                del node[name]
        elif override.is_add() and OmegaConf.select(whole, key) is not None and not isinstance(value, dict | list):
            raise UserError(f"{said}: {key} is there already: leave out the +")
        else:
            added = override.is_add() or override.is_force_add()
            OmegaConf.update(whole, key, value, merge=True, force_add=added)
    except OmegaConfBaseException:
        raise UserError(f"{said}: there is no setting {key!r}; see conf/ for what there is") from None


def _check_choice(conf: Path, override: str) -> None:
    """Raise UserError for group=name with a name that does not exist, and offer the nearest."""
    group, equals, name = override.partition("=")
    if not group or not equals:
        raise UserError(f"override {override!r}: expected key=value, for example seed=2 or norm=bn")
    if group.lstrip("+~").split(".")[0].split("/")[0] == "hydra":
        raise UserError(
            f"override {override!r}: Hydra's own settings have no effect; set the folders by results= and runs="
        )
    if (conf / group).is_dir() and name not in (names := choices(conf / group)):
        raise UserError(nearest(name, names, group, f"conf/{group}/ has all {len(names)}"))
