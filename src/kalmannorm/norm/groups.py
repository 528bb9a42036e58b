"""Which images share statistics: the one place where the rule stands.

Image i of a batch of G groups belongs to group i mod G (interleaved). In NCHW the groups are then a free view
[stat_batch, G * C, H, W] for the native batch-norm kernels; and k devices that are dealt the images in turn hold whole
groups, so that they compute what one device does.
"""

import torch
from torch import Tensor


def count(batch: int, stat_batch: int | None) -> int:
    """Number of groups in a batch. `stat_batch` None means the whole batch is one group."""
    if stat_batch is None:
        return 1
    if batch % stat_batch:
        raise ValueError(f"a batch of {batch} images does not divide into groups of stat_batch = {stat_batch}")
    return batch // stat_batch


def split(x: Tensor, groups: int) -> Tensor:
    """[N, C, ...] -> a view [N / G, G, C, ...]; [:, g] are the images of group g. Free in every memory format."""
    return x.unflatten(0, (x.shape[0] // groups, groups))


def merge(split: Tensor, shape: torch.Size) -> Tensor:
    """A fresh tensor of groups as [N, C, ...] again; not a view, on which an in-place ReLU would cost copies."""
    return torch.ops.aten._unsafe_view(split, shape)
