"""What is read off one run: a final value, one on the way, the steps to a level, gaps, errors, shares."""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from kalmannorm.errors import UserError
from kalmannorm.experiments import record as records

Run = Mapping[str, Any]


class Quantity(NamedTuple):
    """How a quantity is compared. Logarithms are compared by subtraction: an effect of d is 100 (e^d - 1) percent."""

    unit: str
    log: bool = False


# A detector's: COCO's average precision; at IoU 0.5 and 0.75, of small, medium and large objects.
PRECISIONS = tuple(
    f"{kind}_ap{of}" for kind in ("box", "mask") for of in ("", "50", "75", "_small", "_medium", "_large")
)
# What a record holds in percent under each kind of statistics; top5 of videos, the last two are a segmenter's.
PERCENT = ("accuracy", "top5", *PRECISIONS, "miou", "pixel_accuracy")
QUANTITIES = {
    **dict.fromkeys((*PERCENT, "gap", "ln_share", "bn_share"), Quantity("points")),
    **dict.fromkeys(("steps_to", "gap_measured", "gap_used"), Quantity("%", log=True)),
    **dict.fromkeys(("relative_gap_measured", "relative_gap_used"), Quantity("%", log=True)),
    **dict.fromkeys(("depth_growth", "zeta_growth", "loss", "train_loss"), Quantity("")),
    **{
        f"{what}_{moment}": Quantity("%", log=True)
        for what in ("posterior_error", "first_error", "posterior_spread")
        for moment in ("mean", "var")
    },
}
SHARES = {"ln_share": 1, "bn_share": 2}  # places in a Switchable Norm's weights: IN, LN, BN
EPS = 1e-5  # torch's default for normalizers, which the models here keep: a channel that is always 0 divides by it


def value(run: Run, quantity: str = "accuracy", at: float | None = None, level: float | None = None) -> float | None:
    """Return a quantity of QUANTITIES, its logarithm where it has `log`; None where the record does not have it.

    `at`: of an accuracy, after this part of the run's steps instead of its end. `level`: of steps_to, in percent.
    """
    if quantity == "accuracy" and at is not None:
        return accuracy_at(run, at)
    if quantity == "steps_to":
        assert level is not None
        steps = steps_to(run, level)
        return math.log(steps) if steps is not None and math.isfinite(steps) else None
    if quantity in SHARES:
        return _share(run, SHARES[quantity])
    if quantity == "gap":  # how far apart the same weights are under online and moving statistics
        return None if missing(run["gap"]) else abs(run["gap"])
    if quantity == "train_loss":  # the last epoch's
        losses = run.get("train_loss")
        return float(losses[-1]) if isinstance(losses, list) and not missing(losses[-1]) else None
    if quantity == "zeta_growth":
        return _zeta_growth(run.get("norms") or {})
    if quantity in (*PERCENT, "loss"):
        return None if missing(run.get(quantity)) else float(run[quantity])
    if quantity not in QUANTITIES:
        raise UserError(f"unknown quantity {quantity!r}; valid: {', '.join(QUANTITIES)}")
    return _of_arrays(run).get(quantity)


def accuracy_at(run: Run, part: float) -> float | None:
    """Return the percent after the epoch that ends nearest to this part of the run's steps."""
    steps, values = run.get("step"), run.get("curve")
    if not isinstance(steps, list) or not isinstance(values, list):
        return None
    nearest = min(range(len(values)), key=lambda i: abs(steps[i] - part * steps[-1]))
    return None if values[nearest] is None else float(values[nearest])


def steps_to(run: Run, level: float) -> float | None:
    """Count the optimizer steps until the accuracy reaches `level` percent, straight between evaluations; infinite:
    never.

    Training starts at chance. None where there is no curve.
    """
    if not isinstance(run.get("step"), list) or not isinstance(run.get("curve"), list):
        return None
    before = (0.0, 100 / run["dataset.classes"])
    for step, reached in zip(run["step"], run["curve"], strict=False):
        if reached is not None and reached >= level:
            (start, low) = before
            part = (level - low) / (reached - low) if reached > low else 1.0
            return max(1.0, start + max(0.0, part) * (step - start))
        if reached is not None:
            before = (float(step), float(reached))
    return math.inf


def missing(found: Any) -> bool:
    """Say whether it is no number: what a record does not have is None in its own values, nan in the frame."""
    return not isinstance(found, int | float) or not math.isfinite(found)


def block(name: str) -> tuple[str, ...]:
    """Branches of a block, such as an Inception's, are as deep as each other: "blocks.0.b3.1.bn" is in blocks.0."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
    return tuple(parts[: number + 1])


def layers(run: Run, count: int) -> list[str]:
    """Name the normalizers in network order; their numbers where the record does not have `count` of them."""
    names = (run.get("norms") or {}).get("order") or []
    return names if len(names) == count else [str(i + 1) for i in range(count)]


def _share(run: Run, place: int) -> float | None:
    """Return a weight of Switchable Norm in percent: mean over layers, and over the weights of the means and the
    variances."""
    mixed = (run.get("norms") or {}).get("mixture") or {}
    weights = [layer[moment][place] for layer in mixed.values() for moment in ("mean", "var")]
    return 100 * math.fsum(weights) / len(weights) if weights else None


def _zeta_growth(norms: Mapping[str, Any]) -> float | None:
    """Return how ln of gamma decay's mean coefficient grows with depth."""
    found = norms.get("gamma_decay") or {}
    names = [name for name in norms.get("order") or [] if name in found]
    growth = _growth(names, np.array([found[name]["zeta"] for name in names])) if len(names) > 2 else math.nan
    return growth if math.isfinite(growth) else None


def _of_arrays(run: Run) -> Mapping[str, float]:
    return _read(str(run["id"]), str(run["results"]), tuple((run.get("norms") or {}).get("order") or ()))


@cache
def _read(identity: str, results: str, order: tuple[str, ...]) -> dict[str, float]:
    """Return the logarithms of the mean variance gaps (of the measurement; of what normalizes), how the relative gap
    grows with depth, and by how much the posterior's errors are above the measurement's."""
    try:
        found = records.arrays(identity, results)
    except UserError:  # no arrays beside the record: nothing to compare
        return {}
    if "gap_measured" not in found:
        return {}
    measured, used, below = found["gap_measured"], found.get("gap_used"), found["moving_var"][:, None] + EPS
    values: dict[str, float] = {}
    for name, gap in (("measured", measured), ("used", measured if used is None else used)):
        values[f"gap_{name}"] = _log(np.nanmean(gap))
        values[f"relative_gap_{name}"] = _log(np.nanmean(gap / below))
    of_layers = found["layer_gap_measured"]
    if len(of_layers) > 2:
        values["depth_growth"] = _growth(layers({"norms": {"order": list(order)}}, len(of_layers)), of_layers)
    for moment in ("mean", "var"):
        for what, key in (("error", f"layer_error_{moment}"), ("spread", f"layer_error_{moment}_spread")):
            if key not in found or not np.isfinite(found[key][1]).any():
                continue
            measurement, _, posterior = found[key][:, np.isfinite(found[key][1])]  # layers that have a prior
            values[f"posterior_{what}_{moment}"] = _log(np.median(posterior / measurement))
            if what == "error" and np.isfinite(found[key][1, 0]):  # where the input has a belief
                values[f"first_error_{moment}"] = _log(found[key][2, 0] / found[key][0, 0])
    return {key: number for key, number in values.items() if math.isfinite(number)}


def _growth(names: Sequence[str], gaps: np.ndarray) -> float:
    """Say by how much ln(gap) grows from the first block to the last, by a straight line through the layers."""
    order = list(dict.fromkeys(map(block, names)))
    depth = np.array([order.index(block(name)) for name in names]) / max(1, len(order) - 1)
    return float(np.polyfit(depth, np.log(gaps), 1)[0]) if (gaps > 0).all() and np.ptp(depth) else math.nan


def _log(number: Any) -> float:
    return math.log(number) if number > 0 else math.nan
