"""What is read off one record: a final accuracy, the steps to an accuracy, gaps, counts, speed."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from kalmannorm.report.read import Record

# Unit of a difference of two values, per quantity that claims may name.
UNITS = {
    "accuracy": "points",
    "box_ap": "points",
    "mask_ap": "points",
    "gap": "points",
    "mean_accuracy": "points",
    "parameters": "parameters",
    "speed": "%",
    "variance_gap": "",
    "relative_variance_gap": "",
    "depth_trend": "",
    "posterior_error_mean": "%",
    "posterior_error_var": "%",
    "first_error_mean": "%",
    "first_error_var": "%",
    "ln_share": "points",
    "bn_share": "points",
}
# Quantities that say nothing of a network that has not learned: at chance there is no gap between statistics.
OF_THE_LEARNED = frozenset(UNITS) - {"accuracy", "box_ap", "mask_ap", "mean_accuracy", "parameters", "speed"}
CHANCE = 1.2  # times 100 % / classes: what a network that guesses is rarely above on thousands of images
SHARES = {"ln_share": 1, "bn_share": 2}  # places in a Switchable Norm's weights: IN, LN, BN


def accuracy(run: Record, statistics: str, name: str = "accuracy") -> float | None:
    """Percent after the last epoch; None where the record has none under these statistics. May be NaN.

    `name`: another of the final values, such as a detector's box_ap.
    """
    value = (run["final"].get(statistics) or {}).get(name)
    return None if value is None else float(value)


def accuracy_at(run: Record, statistics: str, part: float) -> float | None:
    """Percent after the epoch that ends nearest to this part of the run's steps; None where the record has no curve."""
    curves = run.get("curves") or {}
    steps, values = curves.get("step"), curves.get(statistics)
    if not steps or not values:
        return None
    nearest = min(range(len(values)), key=lambda i: abs(steps[i] - part * steps[-1]))
    return math.nan if values[nearest] is None else float(values[nearest])


def steps_to(run: Record, statistics: str, target: float) -> float:
    """Optimizer steps up to the first evaluation that reaches `target` percent; infinite when none does.

    NaN where the record has no curve. Resolution: one evaluation, which is one epoch.
    """
    curves = run.get("curves") or {}
    steps, values = curves.get("step"), curves.get(statistics)
    if not steps or not values:
        return math.nan
    reached = (step for step, value in zip(steps, values, strict=False) if value is not None and value >= target)
    return float(next(reached, math.inf))


def at_chance(run: Record) -> bool:
    """Whether a classifier is no better than chance, under none of its statistics: it has not learned."""
    found = [values["accuracy"] for values in run["final"].values() if "accuracy" in values]
    return bool(found) and max(found) <= CHANCE * 100 / run["config"]["dataset"]["classes"]


def of_run(run: Record, quantity: str, statistics: str, folder: Path, at: float | None = None) -> float | None:
    """A quantity of UNITS; None where the record, or the arrays beside it in `folder`, do not have it.

    `at`: of an accuracy, after this part of the run's steps instead of its end.
    """
    if at is not None:
        return _finite(accuracy_at(run, statistics, at))
    if quantity in ("accuracy", "box_ap", "mask_ap"):
        return _finite(accuracy(run, statistics, quantity))
    if quantity == "gap":  # how far apart the same weights are under online and moving statistics
        online, moving = accuracy(run, "online"), accuracy(run, "moving")
        return None if online is None or moving is None else _finite(abs(online - moving))
    if quantity == "mean_accuracy":  # over all epochs: who learns faster has more
        curve = [value for value in (run.get("curves") or {}).get(statistics) or [] if value is not None]
        return _finite(sum(curve) / len(curve)) if curve else None
    if quantity in SHARES:
        return _share(run, SHARES[quantity])
    if quantity in UNITS:
        return _of_arrays(run, folder).get(quantity)
    raise ValueError(f"unknown quantity {quantity!r}; valid: {', '.join(UNITS)}")


def machine_name(run: Record) -> str:
    """What two speeds must have in common to be compared: "x86_64, Intel Xeon, 1 thread, fp32"."""
    host, config = run.get("host") or {}, run["config"]
    processes, threads = host.get("processes") or 1, host.get("threads")
    shown = f", {processes} processes" if processes != 1 else ""
    shown += f", {threads} thread{'s' if threads != 1 else ''}" if threads else ""
    compiled = ", compiled" if config.get("compile") else ""
    return f"{host.get('hardware') or 'unnamed hardware'}{shown}, {config.get('precision')}{compiled}"


def _share(run: Record, place: int) -> float | None:
    """A weight of Switchable Norm in percent: mean over layers, and over the weights of the means and the variances."""
    mixed = (run.get("norms") or {}).get("mixture") or {}
    weights = [layer[moment][place] for layer in mixed.values() for moment in ("mean", "var")]
    return _finite(100 * math.fsum(weights) / len(weights)) if weights else None


def _of_arrays(run: Record, folder: Path) -> Mapping[str, float]:
    """Means of the variance gaps that Figure 5 shows, of the variance that normalizes (KN: the posterior); by how many
    percent the posterior's error is larger than the measurement's, in the median of the layers that have a prior and in
    the first normalizer, if it has one."""
    import numpy as np
    from scipy.stats import spearmanr

    from kalmannorm.errors import UserError
    from kalmannorm.report import gaps

    try:
        found = gaps.load(run, folder / "records" / f"{run['id']}.npz")
    except UserError:  # no arrays beside the record: nothing to compare
        return {}
    gap = found.measured if found.used is None else found.used
    layers = found.layer_measured if found.layer_used is None else found.layer_used
    trend = spearmanr(_depths(found.layers), layers).statistic if len(layers) > 2 else math.nan
    values = {
        "variance_gap": float(np.nanmean(gap)),
        "relative_variance_gap": float(np.nanmean(found.relative(gap))),
        "depth_trend": float(trend),
    }
    for moment in ("mean", "var"):
        if found.errors is not None and np.isfinite((errors := found.errors[f"layer_error_{moment}"])[1]).any():
            measurement, _, posterior = errors[:, np.isfinite(errors[1])]
            values[f"posterior_error_{moment}"] = float(100 * (np.median(posterior / measurement) - 1))
            # Of the first normalizer, which has a prior where the model's input has a belief only; else NaN.
            first = errors[2, 0] / errors[0, 0] if np.isfinite(errors[1, 0]) else math.nan
            values[f"first_error_{moment}"] = float(100 * (first - 1))
    return {key: value for key, value in values.items() if math.isfinite(value)}


def _depths(layers: Sequence[str]) -> list[int]:
    """The number of each layer's block, in network order: branches of a block, such as an Inception's, are as deep as
    each other."""

    def block(name: str) -> tuple[str, ...]:  # "blocks.0.b3.1.bn" is in blocks.0, "stem.bn" stands alone
        parts = name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
        return tuple(parts[: number + 1])

    order = list(dict.fromkeys(map(block, layers)))
    return [order.index(block(name)) for name in layers]


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None
