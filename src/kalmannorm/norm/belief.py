"""What a normalizer knows of a feature map before it is measured."""

from typing import NamedTuple

from torch import Tensor


class Belief(NamedTuple):
    """A feature map's estimated distribution: a Gaussian with independent pixels and channels.

    Mean and variance, each [rows, C], in the units of the feature and their square: one row per statistics group, one
    per image for GKN, a single one where moving statistics normalize.
    """

    mean: Tensor
    var: Tensor
