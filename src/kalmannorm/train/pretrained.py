"""Weights that a run begins with: fresh ones, or ImageNet's of a ResNet-50 from a file."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from kalmannorm.errors import UserError, reason
from kalmannorm.experiments.config import Config
from kalmannorm.experiments.record import Record
from kalmannorm.models.i3d import inflate_weights

CLASSIFIER = ("fc.weight", "fc.bias")  # left out


def begin_with_weights(parts: Iterable[nn.Module], config: Config, fresh: bool, record: Record) -> None:
    """Load the file `config.weights`, where there is one, into the parts of a `fresh` run; say in the record where the
    weights come from. UserError: as load_pretrained."""
    origin = "trained from scratch" if config.weights is None else "ImageNet weights from a file"
    record["weights"] = {"origin": origin, "sha256": config.arch.options.get("pretrained")}
    if config.weights is not None and fresh:
        load_pretrained(parts, config.weights)


def load_pretrained(parts: Iterable[nn.Module], file: str) -> None:
    """Load ImageNet weights of a ResNet-50 by torchvision's names (conv1.weight, layer4.2.bn3.running_var, ...) into
    the parts of a converted network that have them; its classifier is left out. Convolutions over frames get them
    inflated.

    q, R and SN's weights keep their start where the file, of another normalizer, has none. UserError: not such a file;
    another network; a weight that is missing.
    """
    flat = _read_weights(Path(file).expanduser())
    for part in parts:
        state, weights = part.state_dict(), inflate_weights(flat, part)
        chosen = {}
        for key, value in state.items():
            left_out = key in CLASSIFIER or key.endswith(("num_batches_tracked", "_extra_state"))
            if left_out or not isinstance(value, Tensor):
                continue
            if key not in weights:
                if key.endswith(("gain_logit", "noise_raw", "mean_weight", "var_weight")):
                    continue
                raise UserError(f"weights = {file}: {key} is missing; expected a ResNet-50 by torchvision's names")
            if weights[key].shape != value.shape:
                shapes = f"{list(weights[key].shape)}, expected {list(value.shape)}"
                raise UserError(f"weights = {file}: {key} is {shapes}: of another network")
            chosen[key] = weights[key]
        part.load_state_dict(chosen, strict=False)


def _read_weights(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            found: object = load_file(file)
        else:
            found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        expected = "expected a .pth or .safetensors file of weights"
        raise UserError(f"weights = {file}: {reason(error)}; {expected}") from None
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"weights = {file}: expected a dictionary of tensors (a state dict)")
    return found
