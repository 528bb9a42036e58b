"""Quantities read from one run: a final or intermediate value, the steps to a level, gaps, errors, shares."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from kalmannorm.errors import UserError
from kalmannorm.experiments import record as records

Run = Mapping[str, Any]  # a row of the frame
Value = Callable[[Run], float | None]
# COCO's average precision of a detector: overall, at IoU 0.5 and 0.75, of small, medium and large objects.
PRECISIONS = tuple(
    f"{kind}_ap{of}" for kind in ("box", "mask") for of in ("", "50", "75", "_small", "_medium", "_large")
)
# The values that a record has in percent under each kind of statistics; the last two are of segmenters.
PERCENT = {
    "accuracy": "top-1 accuracy",
    "top5": "top-5 accuracy",
    **dict.fromkeys(PRECISIONS, "average precision"),
    "miou": "mean IoU",
    "pixel_accuracy": "pixel accuracy",
}
EPS = 1e-5  # the normalizers' eps, torch's default; keeps the relative gap of a channel that is always 0 finite


def accuracy_at(run: Run, part: float) -> float | None:
    """Return the accuracy in percent after the epoch that ends nearest to this part (0 to 1) of the run's steps."""
    steps, values = run.get("step"), run.get("curve")
    if not isinstance(steps, list) or not isinstance(values, list):
        return None
    nearest = min(range(len(values)), key=lambda i: abs(steps[i] - part * steps[-1]))
    return None if values[nearest] is None else float(values[nearest])


def steps_to(run: Run, level: float) -> float | None:
    """Return the optimizer steps after which the accuracy reaches `level` percent; inf: never. None: no curve.

    The accuracy is taken as linear between evaluations, and as chance at the start.
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
    """Say whether a value is no finite number: a missing one is None in a record's own values, nan in the frame."""
    return not isinstance(found, int | float) or not math.isfinite(found)


def block(name: str) -> tuple[str, ...]:
    """Return a layer's block, whose branches count as equally deep: "blocks.0.b3.1.bn" is in blocks.0."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
    return tuple(parts[: number + 1])


def norm_state(run: Run, key: str) -> Any:
    """Return what the record says of the normalizers after training under this key; None if it says nothing."""
    return (run.get("norms") or {}).get(key)


def layers(run: Run, count: int) -> list[str]:
    """Return the normalizers' names in network order; numbers from 1 if the record does not have `count` names."""
    names = norm_state(run, "order") or []
    return names if len(names) == count else [str(i + 1) for i in range(count)]


@cache
def _of_arrays(identity: str, results: str, order: tuple[str, ...]) -> dict[str, float]:
    """Return the quantities that are read from the arrays beside a record, without those that are missing.

    They are logarithms of: the mean variance gaps, of the measured variance and of the used one; the ratio of the
    posterior's errors to the measurement's. Also the growth of the relative gap with depth.
    """
    found = records.arrays_if_any(identity, results)
    if "gap_measured" not in found:  # nothing to compare
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
            measurement, _, posterior = found[key][:, np.isfinite(found[key][1])]  # only layers with a prior
            values[f"posterior_{what}_{moment}"] = _log(np.median(posterior / measurement))
            if what == "error" and np.isfinite(found[key][1, 0]):  # if the input has a belief
                values[f"first_error_{moment}"] = _log(found[key][2, 0] / found[key][0, 0])
    return {key: number for key, number in values.items() if math.isfinite(number)}


def _growth(names: Sequence[str], gaps: np.ndarray) -> float:
    """Return the growth of ln(gap) from the first block to the last, along a straight line fitted to the layers."""
    order = list(dict.fromkeys(map(block, names)))
    depth = np.array([order.index(block(name)) for name in names]) / max(1, len(order) - 1)
    return float(np.polyfit(depth, np.log(gaps), 1)[0]) if (gaps > 0).all() and np.ptp(depth) else math.nan


def _log(number: Any) -> float:
    return math.log(number) if number > 0 else math.nan


def number(found: Any) -> float | None:
    """Return a value of a record or the frame as a float; None if it is not a finite number."""
    return None if missing(found) else float(found)


def _recorded(key: str) -> Value:
    return lambda run: number(run.get(key))


def _last_loss(run: Run) -> float | None:
    losses = run.get("train_loss")
    return number(losses[-1]) if isinstance(losses, list) else None


def _share(place: int) -> Value:
    """Return a function that reads a weight of Switchable Norm (IN, LN, BN by `place`) in percent, averaged over layers
    and over the weights for means and variances."""

    def share(run: Run) -> float | None:
        mixed = norm_state(run, "mixture") or {}
        weights = [layer[moment][place] for layer in mixed.values() for moment in ("mean", "var")]
        return 100 * math.fsum(weights) / len(weights) if weights else None

    return share


def _zeta_growth(run: Run) -> float | None:
    """Return the growth of ln(gamma decay's mean coefficient) with depth, as _growth; None for two layers or fewer."""
    found = norm_state(run, "gamma_decay") or {}
    names = [name for name in norm_state(run, "order") or [] if name in found]
    return number(_growth(names, np.array([found[name]["zeta"] for name in names]))) if len(names) > 2 else None


def _array(key: str) -> Value:
    return lambda run: _of_arrays(run["id"], str(run["results"]), tuple(norm_state(run, "order") or ())).get(key)


class Quantity(NamedTuple):
    """How a quantity is read from a run and compared. With `log`, `read` gives logarithms: a difference of d means
    100 (e^d - 1) percent."""

    unit: str
    read: Value
    log: bool = False
    lower: bool = False  # whether lower is better


OF_ARRAYS = (
    *(f"{gap}_{of}" for gap in ("gap", "relative_gap") for of in ("measured", "used")),
    *(f"{what}_{of}" for what in ("posterior_error", "first_error", "posterior_spread") for of in ("mean", "var")),
)
QUANTITIES = {
    **{key: Quantity("points", _recorded(key)) for key in PERCENT},
    # Distance between the same weights' accuracies under online and moving statistics.
    "gap": Quantity("points", lambda run: None if missing(run["gap"]) else abs(run["gap"])),
    "shift": Quantity("points", _recorded("shift")),  # accuracy minus that under moving statistics
    "ln_share": Quantity("points", _share(1)),
    "bn_share": Quantity("points", _share(2)),
    **{key: Quantity("%", _array(key), log=True) for key in OF_ARRAYS},
    "depth_growth": Quantity("", _array("depth_growth")),
    "zeta_growth": Quantity("", _zeta_growth),
    "loss": Quantity("", _recorded("loss"), lower=True),
    "train_loss": Quantity("", _last_loss, lower=True),
}


def value(quantity: str = "accuracy", at: tuple[float, float] | None = None) -> Value:
    """Return a function that reads a quantity (its logarithm if it has `log`) from a run, or None if it is missing.

    `at`: (part, whole); the function then reads the accuracy after this part of the run's steps. UserError: an unknown
    quantity.
    """
    if at is not None:
        return lambda run: accuracy_at(run, at[0] / at[1])
    if quantity not in QUANTITIES:
        raise UserError(f"unknown quantity {quantity!r}; valid: {', '.join(QUANTITIES)}")
    return QUANTITIES[quantity].read
