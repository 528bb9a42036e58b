"""The frame that every report is made from: a row for each run and kind of statistics, settings as dotted columns.

Beside the record's own values it has the columns by which runs are found and grouped, whose words name only what
differs from the defaults of conf/:

    network, width, normalizer,
    grad_batch, stat_batch       what a card's row names ("bkn belief=output"; stat_batch 0: none)
    dataset, budget, schedule    what a card leaves open ("lite epochs=30")
    state, note                  "used", "failed", "left out" or "stale", and why (`check`)
    learned                      better than chance under some statistics
"""

import functools
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from kalmannorm.experiments.config import conf_dir
from kalmannorm.experiments.record import NUMERICS, read_all
from kalmannorm.presets import BATCH_STATISTICS, KALMAN, PRESETS, preset_options

ROW = ["network", "width", "normalizer", "grad_batch", "stat_batch"]
GROUP = ["dataset", "budget", "schedule"]
KIND = ["arithmetic", "data.sha256"]  # what runs must have in common, beside their row, to be averaged
STATISTICS = ("moving", "online", "precise")
APART = ("width", "pretrained", "frozen_stages")  # arch settings left out of `network`: groups and weights have them
CHANCE = 1.2  # times 100 % / classes: on thousands of images, a network that guesses is rarely above


@dataclass(frozen=True)
class Identity:
    """What a card's row says about its runs, in the words of the frame's columns. None: the row leaves it open."""

    network: str
    normalizer: str
    grad_batch: int
    stat_batch: int
    width: float | None = None
    schedule: str | None = None  # the row's schedule, which a group's replaces
    rates: str | None = None  # a schedule with settings of the row's own, which a group's does not replace
    length: str = ""  # budget settings of the row's own, such as "epochs=5"
    dataset: str | None = None  # if a column fixes it


def load(results: str | Path = "results", numerics: int = NUMERICS, spelled: Collection[str] = ()) -> pd.DataFrame:
    """Return all records of a results folder as a frame, checked. Files that are not usable records are reported and
    left out. Records of other `numerics` are marked stale.

    `spelled`: settings of the budget, such as "budget.epochs", that the column `budget` names at their defaults too.
    """
    rows = [row for record in read_all(results) for row in _rows(record, Path(results), spelled)]
    columns = ["id", "numerics", "status", "statistics", "seed", "accuracy", "gap", "learned", *ROW, *GROUP, *KIND]
    columns += ["epoch", "step", "curve"]
    frame = pd.DataFrame(rows, columns=None if rows else columns)
    return check(frame.reindex(columns=list(dict.fromkeys([*columns, *frame.columns]))), numerics)


def check(runs: pd.DataFrame, numerics: int = NUMERICS, arithmetic: str = "") -> pd.DataFrame:
    """Return the frame with the columns `state` and `note`: what must not be averaged, compared or overlooked.

    Runs of other numerics are stale. If runs of a row differ in arithmetic or data, those of `arithmetic` are used if
    there are any, else the kind with the most seeds; the others are left out. Of two runs with one seed, the one that
    started first is used.
    """
    few = ["numerics", "status", "reason", "seed", "learned", "host.started", *ROW, *GROUP, *KIND]
    one = runs.drop_duplicates("id").set_index("id").reindex(columns=few)  # all columns would take ten times as long
    one["row"] = one.groupby([*ROW, *GROUP], dropna=False).ngroup()
    one["kind"] = one.groupby(KIND, dropna=False).ngroup()
    stale = one[one.numerics != numerics]
    current = one[one.numerics == numerics].sort_values("host.started", kind="stable")
    done, failed = current[current.status == "done"], current[current.status == "failed"]
    kinds = done.groupby(["row", "kind"]).seed.nunique().reset_index(name="seeds")
    kinds["runs"] = kinds.kind.map(done.kind.value_counts())
    kinds["asked"] = kinds.kind.isin(done.kind[done.arithmetic == arithmetic])
    chosen = done.row.map(kinds.sort_values(["asked", "seeds", "runs", "kind"]).groupby("row").kind.last())
    other, same = done[done.kind != chosen], done[done.kind == chosen]
    again = same[same.duplicated(["row", "seed"])]
    first = same.drop_duplicates(["row", "seed"]).reset_index().set_index(["row", "seed"]).id
    retried = failed.set_index(["row", "seed"]).index.isin(done.set_index(["row", "seed"]).index)

    state = pd.Series("used", one.index)
    for name, of in (("stale", stale), ("failed", failed), ("left out", failed[retried]), ("left out", other)):
        state[of.index] = name
    state[again.index] = "left out"

    values = one.drop_duplicates("kind").set_index("kind")

    def otherwise(run: Any) -> str:
        usual = values.loc[chosen[run.name]]
        said = [f"{run.arithmetic} where the others are {usual.arithmetic}"] * (run.arithmetic != usual.arithmetic)
        return " and ".join([*said, *["other data than the others'"] * (run["data.sha256"] != usual["data.sha256"])])

    note = dict.fromkeys(one.index, "")
    for of, words in (
        (stale, lambda run: f"stale: made by NUMERICS {run.numerics}, this is {numerics}"),
        (other, lambda run: f"left out: {otherwise(run)}"),
        (again, lambda run: f"left out: seed {run.seed} has two records, {first[run.row, run.seed]} is used"),
        (failed, lambda run: f"failed: {run.reason or 'no reason recorded'}"),
        (done[~done.learned.astype(bool)], lambda run: "at chance under any statistics"),
    ):
        for identity, run in of.iterrows():
            note[identity] = "; ".join(filter(None, [note[identity], words(run)]))
    return runs.assign(state=runs.id.map(state), note=runs.id.map(note))


def curves(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the accuracies (percent) after every epoch in long form: a row per run, kind of statistics and epoch."""
    drawn = runs.curve.map(lambda curve: isinstance(curve, list) and len(curve) > 0)
    whole = runs[drawn.astype(bool)]  # of no runs, it would be no mask
    settings = [column for column in runs if column not in ("curve", "step", "epoch", "train_loss", "accuracy")]
    long = whole[[*settings, "epoch", "step", "curve"]].explode(["epoch", "step", "curve"], ignore_index=True)
    return long.rename(columns={"curve": "accuracy"}).astype({"epoch": int, "step": int, "accuracy": float})


@functools.cache
def identity(text: str) -> Identity:
    """Return the Identity of runs with a card's settings, given as JSON text (hashable, for the cache)."""
    settings: dict[str, Any] = json.loads(text)
    chosen = {**defaults(), **{key.lstrip("+"): value for key, value in settings.items()}}
    batch = dict(zip(("grad_batch", "stat_batch"), batch_sizes(chosen["batch"]), strict=True)) | _under("batch", chosen)
    known = norm_defaults(chosen["norm"])
    norm = {"name": known["name"], **_under("norm", chosen)}
    norm["options"] = {**(known.get("options") or {}), **_under("norm.options", chosen)}
    shared = {norm["name"], chosen.get("arch.head_norm")} & {*BATCH_STATISTICS}
    stat_batch = batch["stat_batch"] if shared else None
    arch = _own(_conf("arch", chosen["arch"]), _under("arch", chosen), APART)
    rates = _own(_conf("schedule", chosen["schedule"]), own) if (own := _under("schedule", chosen)) else {}
    return Identity(
        network=_words(chosen["arch"], arch),
        normalizer=_normalizer(norm, stat_batch),
        grad_batch=batch["grad_batch"],
        stat_batch=stat_batch or 0,
        width=float(chosen["arch.width"]) if "arch.width" in chosen else None,
        schedule=chosen["schedule"] if "schedule" in settings else None,
        rates=_words(chosen["schedule"], rates) if own else None,
        length=_words("", dict(sorted(_under("budget", chosen).items()))).strip(),
    )


def _rows(record: Mapping[str, Any], results: Path, spelled: Collection[str] = ()) -> list[dict[str, Any]]:
    """Return a row of the frame for each kind of statistics in the record; a failed record has a row for every kind."""
    config, final, curve = record["config"], record.get("final") or {}, record.get("curves") or {}
    data, host, batch = record.get("data") or {}, record.get("host") or {}, config["batch"]
    shared = {key: record.get(key) for key in ("id", "numerics", "status", "reason", "parameters", "norms", "weights")}
    shared |= flat(config, "") | flat(data, "data.") | flat(host, "host.")
    names = ("dataset", "budget", "schedule", "arch")
    conf = {**resolved(*(config[part].get("name", "") for part in names))}
    conf["budget"] = {key: value for key, value in conf["budget"].items() if f"budget.{key}" not in spelled}
    dataset, budget, schedule, arch = (
        _words(
            config[part].get("name", ""),
            _own(conf[part], {k: v for k, v in config[part].items() if k != "name"}, APART),
        )
        for part in names
    )
    width = config["arch"].get("width")
    found = {kind: values["accuracy"] for kind, values in final.items() if "accuracy" in values}
    shared |= {
        "config": config,
        "training": record.get("final_on_training_images"),
        "results": str(results),
        "network": arch,
        "width": 1.0 if width in (None, conf["arch"].get("width")) else float(width),
        "normalizer": _normalizer(config["norm"], batch.get("stat_batch")),
        "grad_batch": batch["grad_batch"],
        "stat_batch": batch.get("stat_batch") or 0,
        "dataset": dataset,
        "budget": budget,
        "schedule": schedule,
        "arithmetic": ", ".join(
            [
                str(config["precision"]),
                *(word for word, on in (("compiled", "compile"), ("deterministic", "deterministic")) if config[on]),
            ]
        ),
        "data.sha256": f"{data.get('sha256') or data.get('fidelity') or ''}{config['arch'].get('pretrained') or ''}",
        "learned": not found or max(found.values()) > CHANCE * 100 / config["dataset"].get("classes", 1),
        "gap": found["online"] - found["moving"] if {"online", "moving"} <= found.keys() else None,
        **{key: curve.get(key) for key in ("epoch", "step", "train_loss", "lr")},
    }

    def of_kind(kind: str) -> dict[str, Any]:
        shift = found[kind] - found["moving"] if {kind, "moving"} <= found.keys() else None
        return {"statistics": kind, "curve": curve.get(kind), "shift": shift, **final.get(kind, {})}

    return [shared | of_kind(kind) for kind in list(final) or list(STATISTICS)]


def own_options(norm: Mapping[str, Any], stat_batch: int | None) -> dict[str, Any]:
    """Return the options of a normalizer that differ from its preset and conf/norm; nested options have dotted keys."""
    known = norm_defaults(norm["name"])
    defaults = {key: value for key, value in (known.get("options") or {}).items() if value is not None}
    if norm["name"] in KALMAN:
        preset = norm.get("preset") or known["preset"]
        defaults = preset_options(preset, norm["name"], stat_batch, defaults) if preset in PRESETS else {}
    given = {key: value for key, value in flat(norm.get("options") or {}, "").items() if value is not None}
    # Of a normalizer without default options, every option is the run's own.
    return {key: value for key, value in sorted(given.items()) if key not in defaults or defaults[key] != value}


def _normalizer(norm: Mapping[str, Any], stat_batch: int | None) -> str:
    """Write a normalizer's name and what is not its default: "bkn", "bkn released", "bkn belief=output"."""
    words = [str(norm["name"])]
    if norm["name"] in KALMAN:
        known = norm_defaults(norm["name"])["preset"]
        preset, predictor = norm.get("preset") or known, norm.get("predictor")
        words += [preset] if preset != known else []
        words += [str(predictor)] if predictor not in (None, PRESETS.get(preset, {}).get("predictor")) else []
    return _words(" ".join(words), own_options(norm, stat_batch))


def _own(known: Mapping[str, Any], found: Mapping[str, Any], but: Sequence[str] = ()) -> dict[str, Any]:
    """Return the settings that differ from conf/'s (`known`), except for those in `but`. "auto" in conf/ allows any."""
    return {
        key: value
        for key, value in sorted(found.items())
        if key not in but and known.get(key) != "auto" and known.get(key, ...) != value and known
    }


def _words(name: str, own: Mapping[str, Any]) -> str:
    said = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in own.items()]
    return " ".join([name, *said])


def _under(group: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    prefix = f"{group}."
    return {key.removeprefix(prefix): value for key, value in settings.items() if key.startswith(prefix)}


def batch_sizes(name: str) -> tuple[int, int]:
    """Return the images of a gradient and of a statistics batch by the name of a pair: (128, 2) for g128_s2."""
    grad, stat = name.removeprefix("g").split("_s")
    return int(grad), int(stat)


@functools.cache
def defaults() -> dict[str, str]:
    """Return the name that conf/config.yaml chooses in each group."""
    listed = yaml.safe_load((conf_dir() / "config.yaml").read_bytes())["defaults"]
    return {key: value for entry in listed if isinstance(entry, dict) for key, value in entry.items() if value}


@functools.cache
def _conf(group: str, name: str) -> dict[str, Any]:
    """Return the content of conf/GROUP/NAME.yaml, not composed; {} if there is no such file."""
    path = conf_dir() / group / f"{name}.yaml"
    return (yaml.safe_load(path.read_bytes()) or {}) if path.exists() else {}


@functools.cache
def norm_defaults(name: str) -> dict[str, Any]:
    """Return conf/norm/NAME.yaml, or the file that it names as its default."""
    tree = _conf("norm", name)
    return norm_defaults(tree["defaults"][0]) if "defaults" in tree else {"name": name, "preset": "paper", **tree}


@functools.cache
def resolved(dataset: str, budget: str, schedule: str, arch: str) -> dict[str, Any]:
    """Return the files of conf/ with these names, by group, with their references to each other resolved."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    parts = {"dataset": dataset, "budget": budget, "schedule": schedule, "arch": arch}
    tree = {group: dict(_conf(group, name)) for group, name in parts.items()}
    try:
        found: Any = OmegaConf.to_container(OmegaConf.create(tree), resolve=True)
    except OmegaConfBaseException:  # the data set does not have this budget
        found = {group: {} for group in parts}
    found["dataset"].pop("budgets", None)
    return dict(found)


def flat(tree: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return a tree of dicts as one dict with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
