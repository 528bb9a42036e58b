"""Build a run's model and optimizer from its configuration. Errors in it are raised before any data is read."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from kalmannorm.conversion import convert
from kalmannorm.conversion.mapping import Mapped
from kalmannorm.errors import UserError, nearest
from kalmannorm.experiments.config import Config
from kalmannorm.experiments.record import Norms, Tree
from kalmannorm.experiments.settings import DetectionSchedule, Schedule, VideoDataset
from kalmannorm.models import ARCHS, LAST_NORMALIZERS, SEGMENTERS
from kalmannorm.norm import Estimator, PopulationNorm, SparseSwitchableNorm, SwitchableNorm
from kalmannorm.norm.modes import normalizers, seed_noise, set_statistics
from kalmannorm.norm.weight import is_weight_normalized
from kalmannorm.norm.whitened import parametrization_of, whiten_weights, whitened
from kalmannorm.placement import PLACEMENTS

# Decay by name: share of the run that is done -> factor of the learning rate.
DECAY: dict[str, Callable[[float], float]] = {
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "poly": lambda done: (1 - done) ** 0.9,
}
# The keys of norm.options.weights that refreshes use (from_data.py); the others are arguments of whiten_weights.
REFRESH = ("every", "samples", "momentum", "covariance")
# The input's mean and variance for norm.options.input_belief = data, until from_data.measure_input measures them.
UNMEASURED = (torch.zeros(3), torch.ones(3))


def build(config: Config) -> tuple[nn.Module, tuple[str, ...]]:
    """Build the converted model with fresh weights from the run's seed. Return it and the names of its last
    normalizers, which Figure 5 is drawn from.

    UserError: as network; at the budget's resolution a layer (named) would have statistics of a single value.
    """
    model = network(config)
    size, dataset = config.budget.size, config.dataset
    frames = (dataset.frames,) if isinstance(dataset, VideoDataset) else ()
    try_out(model, config, (*frames, size, size))
    last = LAST_NORMALIZERS[config.arch.name]
    # A normalizer that consists of several modules has its moving averages in one of them.
    inner = {name.rpartition(".")[0]: name for name in normalizers(model)}
    return model, tuple(inner.get(name, name) for name in last)


def network(config: Config) -> nn.Module:
    """Build the converted model with fresh weights from the run's seed, without running it.

    UserError: an unknown architecture or option; a normalizer that does not fit a layer (named).
    """
    norm = config.norm
    if isinstance(config.schedule, DetectionSchedule):
        raise UserError(f"schedule {config.schedule.name} is a detector's, in steps: pass schedule=released")
    plain = plain_network(config, SEGMENTERS if config.task == "segmentation" else ARCHS, config.arch.options)
    given = {"preset": norm.preset, "predictor": norm.predictor}
    chosen = {key: value for key, value in given.items() if value} | norm.options
    if weights := chosen.pop("weights", None):
        try:
            whiten_weights(plain, **{key: value for key, value in weights.items() if key not in REFRESH})
        except (TypeError, ValueError) as error:
            raise UserError(f"norm.options.weights: {error}") from None
    if "input_belief" in chosen:
        chosen["input_belief"] = UNMEASURED
    try:
        named: str | Mapped = norm.name
        if placement := chosen.pop("placement", None):
            if placement not in PLACEMENTS:
                raise UserError(nearest(placement, list(PLACEMENTS), "norm.options.placement"))
            named = PLACEMENTS[placement](plain)
        model = convert(plain, named, stat_batch=config.batch.stat_batch, **chosen)
    except ValueError as error:
        raise UserError(f"norm {norm.name} on {config.arch.name}: {error}") from None
    seed_noise(model, config.seed)
    return model


def plain_network(
    config: Config, known: Mapping[str, Callable[..., nn.Module]], options: Mapping[str, Any], **own: Any
) -> nn.Module:
    """Build the network without converting it. `known`: constructors by name; `options`: of the architecture; `own`:
    further arguments. UserError: an unknown architecture or option."""
    name = config.arch.name
    if name not in known:
        raise UserError(f"{config.task} on {config.dataset.name}: {nearest(name, list(known), 'arch')}")
    torch.manual_seed(config.seed)
    try:
        options = {key: value for key, value in options.items() if key != "pretrained"}
        return known[name](classes=config.dataset.classes, **options, **own)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"arch {name}: {error}") from None


def parameter_count(result: Tree) -> int:
    """Count a network's parameters, shared ones once, on the meta device.

    `result`: the settings that determine a run's result, from a record, or from a card's row, which has no seed.

    UserError: as network.
    """
    with torch.device("meta"), _Unfilled():
        return sum(p.numel() for p in network(Config.read({"seed": 0, **result})).parameters())


class _Unfilled(TorchFunctionMode):
    """Skips the initialization of weights: on the meta device it has no effect, but takes seconds."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("normal_", "uniform_", "trunc_normal_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def try_out(model: nn.Module, config: Config, size: tuple[int, ...]) -> None:
    """Run the model on one statistics group of blank inputs, so that errors of shape show before data are read.

    `size`: [height, width] of images, [frames, height, width] of clips. UserError: statistics of a single value; a map
    without pixels.
    """
    set_statistics(model, "online")
    model.eval()
    try:
        with torch.no_grad():
            model(torch.zeros(config.batch.stat_batch or 1, 3, *size))
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{config.arch.name} at {' x '.join(map(str, size))} pixels: {error}") from None
    finally:
        set_statistics(model, "moving")
        model.train()


def optimizer(model: nn.Module, *, momentum: float, weight_decay: float) -> torch.optim.SGD:
    """Return SGD with momentum; weight decay on the weights of convolutions and the classifier only (released code).

    Biases, gamma, beta, and a Kalman normalizer's q, R and transition never decay. The loop sets the learning rate
    before every step, times a group's `part_of_rate` if it has one (1/10 for SSN's logits, as in its public code).
    """
    whitened_weights = whitened(model).values()
    for layer in whitened_weights:  # W decays, not the learned V: finish_gradients adds W's decay to V's gradient
        parametrization_of(layer).weight_decay = weight_decay
    kinds = _ConvNd | nn.Linear  # transposed convolutions too, as in public detectors
    layers = [m for m in model.modules() if isinstance(m, kinds) and m not in set(whitened_weights)]
    decayed = [_decayed(m) for m in layers]
    logits = [p for m in model.modules() if isinstance(m, SparseSwitchableNorm) for p in (m.mean_weight, m.var_weight)]
    chosen = {id(p) for p in [*decayed, *logits]}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    if logits:
        groups.append({"params": logits, "weight_decay": 0.0, "part_of_rate": 0.1})
    return torch.optim.SGD(groups, lr=0.0, momentum=momentum)


def _decayed(layer: _ConvNd | nn.Linear) -> torch.Tensor:
    """Return the parameter that decays: the weight; under weight normalization g, since W = g v / |v| has the norm of
    g whatever v's norm. The recipe has no weight normalization; that the penalty stays one on W is our reading."""
    if is_weight_normalized(layer):
        return layer.parametrizations.weight.original0  # type: ignore[union-attr, return-value]
    return layer.weight


def describe(model: nn.Module, beliefs: dict[str, str | None]) -> Norms:
    """Describe the normalizers after training: their order, their gains, and `beliefs`, which is a belief_report.

    If the model has them, also: the mixture weights of SN; the choices of SSN, each with the share of the training
    after which it was made; gamma decay's mean coefficient, with the number of steps at which the cap limited it.
    """
    gains = {name: m.gain_value for name, m in model.named_modules() if isinstance(m, Estimator)}
    mixture = {name: m.weights for name, m in model.named_modules() if isinstance(m, SwitchableNorm)}
    sparse = {name: m for name, m in model.named_modules() if isinstance(m, SparseSwitchableNorm)}
    choices = {name: {"chosen": m.chosen, "at": m.chosen_at.tolist()} for name, m in sparse.items()}
    decays = {name: m.decay for name, m in model.named_modules() if isinstance(m, PopulationNorm) and m.decay}
    decay = {name: {"zeta": d.zeta.mean().item(), "capped": int(d.capped)} for name, d in decays.items()}
    described: Norms = {
        "order": list(normalizers(model)) or list(gains),  # GKN's have no batch statistics
        "gains": gains,
        "beliefs": beliefs,
    }
    if mixture:
        described["mixture"] = mixture
    if choices:
        described["choices"] = choices
    if decay:
        described["gamma_decay"] = decay
    return described


def learning_rate(
    step: int, total_steps: int, schedule: Schedule, warmup: float | None, grad_batch: int | None = None
) -> float:
    """Return the learning rate of a step (from 0) of a run of `total_steps`.

    With `warmup`, a share of the run, the rate rises linearly to the schedule's highest over that share and then falls
    linearly to 0. With None it follows the schedule: `lr` is either a list of milestones (last epoch, rate) of a full
    run, scaled to this run's length, or one rate, which `decay` takes to 0 over the run. If the schedule has
    `lr_batch`, its rates are for steps of that many images and scale with `grad_batch`.
    """
    scale = grad_batch / schedule.lr_batch if grad_batch and schedule.lr_batch else 1
    if warmup is not None:
        rising = warmup * total_steps
        share = (step + 1) / rising if step + 1 < rising else (total_steps - step) / (total_steps - rising)
        return scale * schedule.peak * min(1.0, share)
    if schedule.decay is not None:
        return scale * schedule.peak * DECAY[schedule.decay](step / total_steps)
    of_epochs = schedule.milestones[-1][0]
    for last_epoch, rate in schedule.milestones:
        if step * of_epochs < last_epoch * total_steps:
            return scale * float(rate)
    return scale * float(schedule.milestones[-1][1])
