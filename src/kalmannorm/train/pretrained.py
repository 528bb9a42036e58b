"""Load the weights that a run starts from: ImageNet weights of a ResNet-50 from a file."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from kalmannorm.errors import UserError, reason
from kalmannorm.experiments.config import Config
from kalmannorm.experiments.record import Record
from kalmannorm.models.i3d import inflate_weights

CLASSIFIER = ("fc.weight", "fc.bias")  # not loaded


def begin_with_weights(parts: Iterable[nn.Module], config: Config, fresh: bool, record: Record) -> None:
    """Load the file `config.weights`, if one is named, into the parts of a `fresh` run; note in the record where the
    weights come from, also of a resumed run. UserError: as load_pretrained."""
    origin = "trained from scratch" if config.weights is None else "ImageNet weights from a file"
    record["weights"] = {"origin": origin, "sha256": config.arch.options.get("pretrained")}
    if config.weights is not None and fresh:
        load_pretrained(parts, config.weights)


def load_pretrained(parts: Iterable[nn.Module], file: str) -> None:
    """Load ImageNet weights of a ResNet-50, named as in torchvision (conv1.weight, layer4.2.bn3.running_var, ...), into
    the parts of a converted network, except for the classifier. For convolutions over frames they are inflated.

    q, R and SN's weights keep their initial values if the file, made with another normalizer, has none. UserError: not
    a file of weights; weights of another network; a missing weight.
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
    """Read a .pth or .safetensors file. UserError: it is not a dictionary of tensors."""
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
