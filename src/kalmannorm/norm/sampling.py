"""The sampling predictor (paper 3.2, released code): it convolves an image drawn from the belief, one for each row."""

import hashlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kalmannorm.norm.belief import Belief
from kalmannorm.norm.checkpoints import preserved
from kalmannorm.norm.contract import is_traced
from kalmannorm.norm.moments import Predictor, full_precision


class Noise(Predictor):
    """Standard normal noise for the images that one convolution samples, one image per row of the belief.

    Draws are keyed by (seed, layer, step), and row g is always the g-th part of a draw, so that they do not depend on
    the number of devices: this one is `shard` = (rank, world), with the groups rank, rank + world, ... Evaluation draws
    too, always the same numbers. `step` counts the training forwards and is saved in the state dict.
    """

    def __init__(self, layer: int, seed: int = 0, shared: bool = False) -> None:
        super().__init__()
        self.shared = shared  # the belief has one row for all groups of all devices
        self.layer = layer
        self.seed = seed
        self.step = 0
        self.shard = (0, 1)

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.step)

    def set_extra_state(self, state: Tensor) -> None:
        self.step = int(state)

    def forward(self, belief: Belief, x: Tensor) -> Tensor:
        """Draw noise [rows, C, H, W] for a belief [rows, C] about the feature map x [N, C, H, W].

        ValueError: a trace in evaluation, whose draws would differ from call to call; an export to ONNX.
        """
        if is_traced() and (not self.training or torch.onnx.is_in_onnx_export()):
            raise ValueError(
                "draws of the sampling predictor cannot be exported: export kalmannorm.fold(model.eval()), or the "
                "model in evaluation by moving statistics"
            )
        # Not a decorator: that imports the whole compiler, half of this module's import time.
        if torch.compiler.is_compiling():
            return torch.compiler.disable(self._draw)(belief, x)
        return self._draw(belief, x)

    def _draw(self, belief: Belief, x: Tensor) -> Tensor:
        key = ("train", preserved(self, self._next_step)) if self.training else ("eval", 0)
        digest = hashlib.blake2b(repr((self.seed, self.layer, *key)).encode(), digest_size=8).digest()
        generator = None  # the meta device, with shapes alone, has none
        if x.device.type != "meta":
            generator = torch.Generator(x.device).manual_seed(int.from_bytes(digest, "big") >> 1)
        rank, world = (0, 1) if self.shared else self.shard
        rows, channels = belief.mean.shape
        shape = (rows * world, channels, *x.shape[2:])
        return torch.randn(shape, generator=generator, device=x.device, dtype=belief.mean.dtype)[rank::world]

    def _next_step(self) -> int:
        self.step += 1
        return self.step - 1


@full_precision
def sampled_conv(
    belief: Belief,
    noise: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: tuple[int, ...] | int = 1,
    padding: tuple[int, ...] | str | int = 0,
    dilation: tuple[int, ...] | int = 1,
    groups: int = 1,
    relu: bool = False,
) -> Belief:
    """Propagate a belief through a convolution by sampling (paper 3.2): draw one image per row, rectify it if `relu`,
    and convolve it, with the layer's own zero padding.

    belief [rows, C_in], standard normal noise [rows, C_in, pixels...] -> mean and population variance over the pixels
    of the convolved image, [rows, C_out].
    """
    mean, var = belief
    # No eps under the root: a channel of variance 0 is constant, with gradient 0.
    sd = torch.where(var > 0, var, 1).sqrt() * (var > 0)
    pixels = noise.dim() - 2
    column = (*mean.shape, *(1,) * pixels)
    image = mean.view(column) + sd.view(column) * noise
    if relu:
        image = F.relu(image)
    dtype = mean.dtype
    convolve: Any = (F.conv1d, F.conv2d, F.conv3d)[pixels - 1]
    biases = None if bias is None else bias.to(dtype)
    image = convolve(image, weight.to(dtype), biases, stride, padding, dilation, groups)
    sampled_var, sampled_mean = torch.var_mean(image, tuple(range(2, image.dim())), correction=0)
    return Belief(sampled_mean, sampled_var)
