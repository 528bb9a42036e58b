"""A run's model and optimizer, from its configuration. What can be wrong is found before any data is read."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
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

# What is left of the rate after a part of the run.
DECAY: dict[str, Callable[[float], float]] = {
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "poly": lambda done: (1 - done) ** 0.9,
}
# Of norm.options.weights: how refreshes go (from_data.py); the rest is whiten_weights's.
REFRESH = ("every", "samples", "momentum", "covariance")
# Stands for norm.options.input_belief = data until from_data.measure_input has seen them.
UNMEASURED = (torch.zeros(3), torch.ones(3))


def build(config: Config) -> tuple[nn.Module, tuple[str, ...]]:
    """Build the converted model, with fresh weights from the run's seed, and the names of its last normalizers (Figure
    5).

    UserError: as of network; statistics of a single value at the budget's resolution, the layer named.
    """
    model = network(config)
    size, dataset = config.budget.size, config.dataset
    frames = (dataset.frames,) if isinstance(dataset, VideoDataset) else ()
    try_out(model, config, (*frames, size, size))
    last = LAST_NORMALIZERS[config.arch.name]
    # What is made of several parts has its averages in one of them.
    inner = {name.rpartition(".")[0]: name for name in normalizers(model)}
    return model, tuple(inner.get(name, name) for name in last)


def network(config: Config) -> nn.Module:
    """Build the converted model, with fresh weights from the run's seed, not tried out yet.

    UserError: an unknown architecture or option; a normalizer that does not fit a layer, named.
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
    """Build the network as it is without conversion, by `known`. UserError: an unknown architecture or option."""
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
    """Count the numbers that a network learns, shared ones once; its weights are not filled in.

    `result`: what determines a run's result, as a record has it, or a card's row without a seed.

    UserError: as of network.
    """
    with torch.device("meta"), _Unfilled():
        return sum(p.numel() for p in network(Config.read({"seed": 0, **result})).parameters())


class _Unfilled(TorchFunctionMode):
    """Leaves new weights as they are: on the meta device filling them in does nothing, and takes seconds to do it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("normal_", "uniform_", "trunc_normal_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def try_out(model: nn.Module, config: Config, size: tuple[int, ...]) -> None:
    """Try one group of blank images, [height, width], or clips, [frames, height, width], so that statistics of a single
    value, or a map that vanishes, show at the start."""
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

    So never on biases, gamma, beta, or a Kalman normalizer's q, R and transition. The rate is set before every step:
    each group's is the `part_of_rate` of it, where it has one (SSN's logits a tenth, public code).
    """
    whitened_weights = whitened(model).values()
    for layer in whitened_weights:  # the decay is of W, not of the V that is learned
        parametrization_of(layer).weight_decay = weight_decay
    kinds = nn.Conv2d | nn.Conv3d | nn.Linear
    layers = [m for m in model.modules() if isinstance(m, kinds) and m not in set(whitened_weights)]
    decayed = [_decayed(m) for m in layers]
    logits = [p for m in model.modules() if isinstance(m, SparseSwitchableNorm) for p in (m.mean_weight, m.var_weight)]
    chosen = {id(p) for p in [*decayed, *logits]}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    if logits:
        groups.append({"params": logits, "weight_decay": 0.0, "part_of_rate": 0.1})
    return torch.optim.SGD(groups, lr=0.0, momentum=momentum)


def _decayed(layer: nn.Conv2d | nn.Conv3d | nn.Linear) -> torch.Tensor:
    """Return the weight; under weight normalization its g: W = g v / |v| has the norm of g, and v's changes nothing. So
    the penalty on W stays the recipe's, which knows no weight normalization: ours."""
    if is_weight_normalized(layer):
        return layer.parametrizations.weight.original0  # type: ignore[union-attr, return-value]
    return layer.weight


def describe(model: nn.Module, beliefs: dict[str, str | None]) -> Norms:
    """Describe the normalizers after training: order, gains, and the `beliefs` of a belief_report.

    And where there are any, the weights of SN, the choices of SSN with the part of the training after which each was
    made, and gamma decay's mean coefficient with the number of steps at which it was held at the cap.
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
    """Return the rate of a step (from 0) of a run of `total_steps`.

    `warmup` None: the schedule's own. Its `lr` is a list of milestones in epochs of a full run, whose last one ends it,
    scaled to this run; or one rate, that `decay` takes to 0 over the run. Else `warmup` is a part of the run: the
    schedule's highest rate is reached linearly over it and then falls linearly to 0. With `lr_batch` rates are meant
    for steps of that many images, and scale with `grad_batch`.
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
