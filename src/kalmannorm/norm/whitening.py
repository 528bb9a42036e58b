"""Whitening in place of Batch Norm: channels are not only scaled to variance 1, but also decorrelated.

Decorrelated Batch Norm by ZCA (Huang et al. 2018) and Iterative Normalization (Huang et al. 2019).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kalmannorm.norm import groups
from kalmannorm.norm.batch import GroupedStatistics, by_whole_groups
from kalmannorm.norm.moments import without_autocast

AVERAGES = ("whitening", "cov")


class _InverseSqrt(torch.autograd.Function):
    """S^(-1/2) of symmetric positive matrices [..., d, d], by eigendecomposition.

    The gradient uses the divided differences of l^(-1/2), which are finite where eigenvalues coincide, instead of the
    derivatives of the eigenvectors, which are not. Second derivatives do go through the eigenvectors: they are not
    finite where eigenvalues coincide.
    """

    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> Tensor:
        roots, vectors = _roots(matrix)
        ctx.save_for_backward(matrix, roots, vectors)
        return vectors @ (vectors / roots.unsqueeze(-2)).mT

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        matrix, roots, vectors = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True wants them as functions of the matrix
            roots, vectors = _roots(matrix)
        row, column = roots.unsqueeze(-1), roots.unsqueeze(-2)
        differences = -1 / (row * column * (row + column))
        symmetric = (grads[0] + grads[0].mT) / 2
        return vectors @ (differences * (vectors.mT @ symmetric @ vectors)) @ vectors.mT


def _roots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the square roots of the eigenvalues, and the eigenvectors."""
    values, vectors = torch.linalg.eigh(matrix)
    return values.clamp(min=torch.finfo(values.dtype).tiny).sqrt(), vectors


def inverse_sqrt(matrix: Tensor) -> Tensor:
    """Return S^(-1/2) of symmetric positive matrices [..., d, d], with finite gradients where eigenvalues coincide."""
    return _InverseSqrt.apply(matrix)


class Whitening(GroupedStatistics):
    """Base of `zca` and `itern`: y = gamma (W (x - mean)) + beta, mean and W from each group of `stat_batch` images.

    x [N, C, ...] -> y. The channels are split into groups of d = `group` adjacent ones, the last one smaller if they do
    not divide; each has a W [d, d] that whitens its covariance + eps. Moving statistics are averages of the mean and of
    W itself (`running_whitening`, as published), or with average="cov" of the covariance + eps (`running_cov`).
    `running_var`, the channels' variance, normalizes nothing: it is there for figures, as in the other normalizers.
    Precise statistics are the pooled mean and covariance of all values. fold turns the layer into a 1x1 convolution.

    ValueError: fewer than 2 d values in a group, whose covariance says little or nothing about the smallest eigenvalues
    (the bound is ours); `group` below 1; any other `average`.
    """

    average: str
    pad_value = 0.0  # on the diagonal for channels that pad the last group
    _pool: tuple[Tensor, Tensor, int] | None = None  # sums over groups of mean and second moment; number of groups

    def __init__(
        self,
        num_features: int,
        *,
        group: int,
        average: str = "whitening",
        moving_unbiased: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(num_features, moving_unbiased=moving_unbiased, **options)
        if group < 1:
            raise ValueError(f"group must be at least 1 channel, not {group}")
        if average not in AVERAGES:
            raise ValueError(f"average must be {' or '.join(map(repr, AVERAGES))}, not {average!r}")
        self.group, self.average = min(group, num_features), average
        self.channel_groups = -(-num_features // self.group)
        self.averaged = (*self.averaged, f"running_{average}")
        start = None if self.running_mean is None else self._present(self.running_mean).diag_embed()
        self.register_buffer(self.averaged[-1], start)

    def whiten(self, cov: Tensor) -> Tensor:
        """Return the whitening matrix W [..., d, d] of covariances [..., d, d]."""
        raise NotImplementedError

    def _present(self, like: Tensor) -> Tensor:
        """Return a mask [groups, d]: 1 for a channel, 0 for the padding of the last group."""
        present = torch.arange(self.channel_groups * self.group, device=like.device) < self.num_features
        return present.view(self.channel_groups, self.group).to(like.dtype)

    def group_size(self, x: Tensor) -> int:
        size = super().group_size(x)
        if groups.values(x, size) < 2 * self.group:
            raise ValueError(
                f"{self.where}: {groups.values(x, size)} values (statistics batch {size} on a feature map of "
                f"{'x'.join(map(str, x.shape[2:])) or '1'}) are fewer than twice the {self.group} channels that they "
                "whiten; take a larger stat_batch or map, or a smaller group"
            )
        return size

    @by_whole_groups
    def forward(self, input: Tensor) -> Tensor:
        if not input.shape[0]:
            return self.of_no_images(input)
        with without_autocast(input.device.type):  # matrix products in float32 as well
            return self._normalize(input).to(input.dtype).contiguous(memory_format=groups.format_of(input))

    def _normalize(self, x: Tensor) -> Tensor:
        wide = x.to(groups.moments_dtype(x)).reshape(*x.shape[:2], -1)
        if self.uses_moving:
            self._check_input_dim(x)
            moving = self.moving()
            mean, whitening = moving[0][None], self._whitening_of(moving[-1])[None]
            centered = self._in_groups(wide - mean[..., None])
        else:
            size = self.group_size(x)
            mean = groups.split(wide.mean(2), size).mean(0)
            centered = self._in_groups(wide - mean.repeat(size, 1)[..., None])
            # One matrix product per image: one per group would first have to gather its images, which are interleaved.
            cov = groups.split(centered @ centered.mT / centered.shape[-1], size).mean(0)
            whitening = self._whiten(self._with_eps(cov))
            self._record(mean.detach(), cov.detach(), whitening.detach(), groups.values(x, size))
        rows = self._scaled(whitening)
        y = (rows.repeat(len(x) // len(rows), 1, 1, 1) @ centered).flatten(1, 2)[:, : self.num_features]
        return (y if self.bias is None else y + self.bias[:, None]).reshape(x.shape)

    def _in_groups(self, x: Tensor) -> Tensor:
        """Reshape [N, C, pixels] to [N, groups, d, pixels], with zero channels to pad the last group."""
        missing = self.channel_groups * self.group - self.num_features
        return (F.pad(x, (0, 0, 0, missing)) if missing else x).unflatten(1, (self.channel_groups, self.group))

    def _with_eps(self, cov: Tensor) -> Tensor:
        """Add eps to the diagonal of cov [..., groups, d, d], but for padding."""
        return cov + self.eps * self._present(cov).diag_embed()

    def _whiten(self, cov: Tensor) -> Tensor:
        """Return W [..., groups, d, d] of covariances to which eps was added; zero for padding."""
        present = self._present(cov)
        # A different value for each padding channel: second derivatives need distinct eigenvalues.
        padding = self.pad_value * torch.arange(1, self.group + 1).to(cov)
        return self.whiten(cov + (padding * (1 - present)).diag_embed()) * present[..., None] * present[:, None]

    def _scaled(self, whitening: Tensor) -> Tensor:
        """Return gamma W: gamma [C] scales the rows of W."""
        if self.weight is None:
            return whitening
        return whitening * self._in_groups(self.weight[None, :, None])

    def moving_whitening(self) -> Tensor:
        """Return W [groups, d, d] of the moving statistics."""
        return self._whitening_of(getattr(self, self.averaged[-1]))

    def _whitening_of(self, average: Tensor) -> Tensor:
        return average if self.average == "whitening" else self._whiten(average)

    def _record(self, mean: Tensor, cov: Tensor, whitening: Tensor, values: int) -> None:
        if self._pool is not None and not self.left:
            first, second, seen = self._pool
            wide = self._in_groups(mean.double()[..., None])
            self._pool = (
                first + mean.double().sum(0),
                second + (cov.double() + wide @ wide.mT).sum(0),
                seen + len(mean),
            )
        var = self._variances(cov)
        self.record(mean, var, values, whitening if self.average == "whitening" else self._with_eps(cov))

    def _variances(self, cov: Tensor) -> Tensor:
        return cov.diagonal(dim1=-2, dim2=-1).flatten(-2)[..., : self.num_features]

    def begin_precise(self) -> None:
        assert self.running_mean is not None
        mean, moving = self.running_mean, getattr(self, self.averaged[-1])
        self._pool = (torch.zeros_like(mean, dtype=torch.float64), torch.zeros_like(moving, dtype=torch.float64), 0)

    @torch.no_grad()
    def end_precise(self) -> None:
        assert self._pool is not None and self.running_mean is not None and self.running_var is not None
        first, second, seen = self._pool
        mean = first / seen
        wide = self._in_groups(mean[None, :, None])[0]
        cov = second / seen - wide @ wide.mT
        self.running_mean.copy_(mean)
        self.running_var.copy_(self._variances(cov))
        cov = self._with_eps(cov)
        getattr(self, self.averaged[-1]).copy_(cov if self.average == "cov" else self._whiten(cov))
        self._pool = None

    @torch.no_grad()
    def folded(self, replaced: type[_BatchNorm]) -> nn.Module:
        """Return the 1x1 convolution that computes the same by moving statistics, grouped if the channels divide.

        ValueError: the layer replaced neither a BatchNorm2d nor a BatchNorm3d.
        """
        kinds: dict[type[_BatchNorm], type[nn.Conv2d | nn.Conv3d]] = {
            nn.BatchNorm2d: nn.Conv2d,
            nn.BatchNorm3d: nn.Conv3d,
        }
        kind = next((conv for norm, conv in kinds.items() if issubclass(replaced, norm)), None)
        if kind is None:
            raise ValueError(f"{self.where} ({type(self).__name__}) folds into a convolution, of images or films alone")
        assert self.running_mean is not None
        scaled = self._scaled(self.moving_whitening()[None])[0]
        shift = -(scaled @ self._in_groups(self.running_mean[None, :, None])[0]).flatten()[: self.num_features]
        even = self.num_features == self.channel_groups * self.group
        rows = scaled.flatten(0, 1) if even else torch.block_diag(*scaled)[: self.num_features, : self.num_features]
        conv = kind(self.num_features, self.num_features, 1, groups=self.channel_groups if even else 1).to(rows)
        assert conv.bias is not None
        conv.weight.copy_(rows.view_as(conv.weight))
        conv.bias.copy_(shift if self.bias is None else shift + self.bias)
        return conv.train(self.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, group={self.group}, average={self.average}"


class ZCANorm(Whitening):
    """Decorrelated Batch Normalization: W = S^(-1/2), the whitening that changes the features least (ZCA).

    x [N, C, ...] -> y; see Whitening. 16 channels in a group, as in the authors' networks for CIFAR-10. Their eps is
    1e-7; the default here is the other normalizers' 1e-5 (ours).
    """

    pad_value = 1.0  # 0 would have no inverse root

    def __init__(self, num_features: int, *, group: int = 16, **options: Any) -> None:
        super().__init__(num_features, group=group, **options)

    def whiten(self, cov: Tensor) -> Tensor:
        return inverse_sqrt(cov)


class IterNorm(Whitening):
    """Iterative Normalization: W approaches S^(-1/2) by `iterations` of Newton's method on S / trace(S).

    x [N, C, ...] -> y; see Whitening. 64 channels in a group and 5 iterations, as in the public code. It whitens an
    ill-conditioned S only in part, which is the point: less noise in the statistics.
    """

    def __init__(self, num_features: int, *, group: int = 64, iterations: int = 5, **options: Any) -> None:
        super().__init__(num_features, group=group, **options)
        if iterations < 0:
            raise ValueError(f"iterations must be at least 0, not {iterations}")
        self.iterations = iterations

    def whiten(self, cov: Tensor) -> Tensor:
        trace = cov.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
        scaled = cov / trace
        found = torch.eye(cov.shape[-1], dtype=cov.dtype, device=cov.device).expand_as(cov)
        for _ in range(self.iterations):
            found = (3 * found - found @ found @ found @ scaled) / 2
        return found * trace.rsqrt()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, iterations={self.iterations}"
