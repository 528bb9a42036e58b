"""Predict how long a run will take from recorded runs like it."""

from collections.abc import Callable, Hashable, Iterable

from kalmannorm.experiments.record import Record, Tree

Kind = Callable[[Tree], Hashable]


def predictor(runs: Iterable[Record], device: str) -> Callable[[Tree], float | None]:
    """Return a function that predicts a run's device-seconds, evaluation included, from its configuration.

    `device`: "cpu" or "cuda"; only runs on such a device count. The function returns None if no recorded run has the
    same network, normalizer, resolution and data set.
    """
    kind_of_device = device.partition(":")[0]
    there = [r for r in runs if r["host"].get("device", "").partition(":")[0] == kind_of_device]
    done = [r for r in there if r["status"] == "done" and r["host"].get("seconds")]
    kinds = [(kind, _rates(done, kind)) for kind in (_same_batch, _same_network)]
    whole = [r for r in done if r["config"]["budget"]["subset"] is None and "data" in r]
    sizes = {r["config"]["dataset"]["name"]: _images(r) for r in whole}

    def predict(config: Tree) -> float | None:
        budget, dataset = config["budget"], config["dataset"]
        images = budget["subset"] or sizes.get(dataset["name"]) or (dataset.get("published") or [None])[0]
        for kind, rates in kinds:
            if images and (known := rates.get(kind(config))):
                return sorted(known)[len(known) // 2] * _seen(config, images)
        return None

    return predict


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _same_network(config: Tree) -> tuple[Hashable, ...]:
    arch, norm = sorted(config["arch"].items()), config["norm"]
    return str(arch), norm["name"], norm.get("predictor"), config["budget"]["size"], config["dataset"]["name"]


def _same_batch(config: Tree) -> tuple[Hashable, ...]:
    return *_same_network(config), config["batch"]["grad_batch"], config["batch"]["stat_batch"]


def _rates(done: list[Record], kind: Kind) -> dict[Hashable, list[float]]:
    """Return the device-seconds per image of all runs, by kind."""
    rates: dict[Hashable, list[float]] = {}
    for record in done:
        config, host = record["config"], record["host"]
        # The `seconds` of a resumed run are those of its last process only.
        seconds = max(host["seconds"], host.get("train_seconds", 0)) * host.get("processes", 1)
        rates.setdefault(kind(config), []).append(seconds / _seen(config, _images(record)))
    return rates


def _seen(config: Tree, images: int) -> int:
    """Return the number of images that a run trains on, repeats counted; `images`: the size of its training set."""
    steps = config["budget"].get("stop_after") or config["dataset"].get("steps")
    every = config["budget"]["epochs"] * images
    return min(every, steps * config["batch"]["grad_batch"]) if steps else every


def _images(record: Record) -> int:
    """Return the number of images in the run's training set."""
    return record["data"]["train_images"]
