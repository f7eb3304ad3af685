"""Losses that others proposed, each reduced to one logit per element: z, and p = sigmoid(z).

They are written from their formulas, and tested against these in NumPy. All expect floating-point
targets in [0, 1] without an ignored value, and give a mean. Left out: LogitNorm and dual focal
loss, which degenerate or jump where there is one logit only.
"""

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from sc_bce import perturb_target, sc_bce_with_logits


def _bce(z: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(z, y, reduction="none")


def _miss(z: Tensor, y: Tensor) -> Tensor:
    """1 - p_t, p_t the probability of the true class."""
    return torch.sigmoid((1 - 2 * y) * z)


class Focal(nn.Module):
    """Lin et al., ICCV 2017: (1 - p_t)^gamma BCE, without class weights."""

    def __init__(self, gamma: float) -> None:
        super().__init__()
        self.gamma = gamma

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return (_miss(z, y) ** self.gamma * _bce(z, y)).mean()


class SampleFocal(nn.Module):
    """FLSD-53, Mukhoti et al., NeurIPS 2020: focal with gamma 5 where p_t < 0.2, else 3."""

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        miss = _miss(z, y)
        gamma = torch.where(miss.detach() > 0.8, 5.0, 3.0)
        return (miss**gamma * _bce(z, y)).mean()


class AdaFocal(nn.Module):
    """Ghosh et al., NeurIPS 2022: a gamma of its own for each bin of p_t, moved every epoch.

    The bins hold equal parts of the validation data by top-label confidence, E_b is their mean
    confidence minus accuracy. gamma <- gamma e^E where it is positive, gamma e^-E where it is
    negative (the loss is then (1 + p_t)^|gamma| BCE), in [-2, 20]; below 0.2 in size its sign
    turns.
    """

    least, low, high = 0.2, -2.0, 20.0

    def __init__(self, bins: int = 15) -> None:
        super().__init__()
        self.edges = torch.linspace(0, 1, bins + 1)[1:-1]
        self.gamma = torch.ones(bins)

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        miss = _miss(z, y)
        gamma = self.gamma[torch.bucketize(1 - miss.detach(), self.edges)]
        weight = torch.where(gamma >= 0, miss, 2 - miss) ** gamma.abs()
        return (weight * _bce(z, y)).mean()

    def see(self, z: Tensor, y: Tensor) -> None:
        """The logits and labels of the validation data, after each epoch."""
        sure, order = torch.sigmoid(z.abs()).flatten().sort()
        right = ((z >= 0) == (y >= 0.5)).flatten()[order].float()
        parts = list(zip(*(x.tensor_split(len(self.gamma)) for x in (sure, right)), strict=True))
        self.edges = torch.stack([part[0] for part, _ in parts[1:]])
        error = torch.stack([part.mean() - hits.mean() for part, hits in parts])
        gamma = self.gamma * torch.exp(torch.where(self.gamma >= 0, error, -error))
        turned = torch.where(gamma >= 0, -self.least, self.least)
        self.gamma = torch.where(gamma.abs() < self.least, turned, gamma).clamp(self.low, self.high)


class Brier(nn.Module):
    """Brier 1950: mean (p - y)^2."""

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return ((torch.sigmoid(z) - y) ** 2).mean()


class MMCE(nn.Module):
    """Kumar et al., ICML 2018: BCE + weight n^-2 sum_ij (c_i - r_i) (c_j - r_j) k(r_i, r_j).

    k = exp(-|r_i - r_j| / 0.4), r is the top-label confidence, c whether the answer is right. It
    is quadratic in the number of elements, so that at most ``most`` of the batch, drawn at
    random, enter it.
    """

    def __init__(self, weight: float, generator: Generator, most: int = 512) -> None:
        super().__init__()
        self.weight, self.generator, self.most = weight, generator, most

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        chosen = torch.randperm(z.numel(), generator=self.generator)[: self.most]
        some, label = z.flatten()[chosen], y.flatten()[chosen]
        sure = torch.sigmoid(some.abs())
        gap = ((some >= 0) == (label >= 0.5)).float() - sure
        kernel = torch.exp(-(sure[:, None] - sure).abs() / 0.4)
        return _bce(z, y).mean() + self.weight * (gap @ kernel @ gap) / len(chosen) ** 2


class Margin(nn.Module):
    """MbLS, Liu et al., CVPR 2022: BCE + (weight / 2) mean relu(|z| - margin)."""

    def __init__(self, margin: float, weight: float = 0.1) -> None:
        super().__init__()
        self.margin, self.weight = margin, weight

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return _bce(z, y).mean() + self.weight / 2 * F.relu(z.abs() - self.margin).mean()


class Neighbours(nn.Module):
    """NACL, Murugesan et al., MICCAI 2023: BCE + weight mean |t - z|, t a share of 3 x 3 labels."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        share = F.avg_pool2d(F.pad(y, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        return _bce(z, y).mean() + self.weight * (share - z).abs().mean()


class HardACE(nn.Module):
    """hL1-ACE, Barfoot et al., MICCAI 2024: (BCE + ACE) / 2.

    ACE is, for each image, the mean over its bins of p that are not empty of |mean p - mean y|.
    """

    def __init__(self, bins: int = 20) -> None:
        super().__init__()
        self.bins = bins

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        p, y_ = torch.sigmoid(z).flatten(1), y.flatten(1)
        place = (p.detach() * self.bins).long().clamp(max=self.bins - 1)
        zeros = p.new_zeros(len(p), self.bins)
        count = zeros.scatter_add(1, place, torch.ones_like(p))
        gap = zeros.scatter_add(1, place, p - y_).abs() / count.clamp(min=1)
        error = gap.sum(1) / (count > 0).sum(1)
        return (_bce(z, y).mean() + error.mean()) / 2


class ConfidencePenalty(nn.Module):
    """Pereyra et al., ICLR Workshop 2017: BCE - weight H(p), H the entropy."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        # H = BCE of the network's own answer
        return (_bce(z, y) - self.weight * _bce(z, torch.sigmoid(z))).mean()


class DiceBCE(nn.Module):
    """BCE + 1 - (2 sum p y + 1) / (sum p + sum y + 1), the usual loss of segmentation.

    With a ``level`` the labels of an image are replaced by ``prior`` with that probability, in
    both terms.
    """

    def __init__(self, level: float = 0.0, prior: float = 0.5, draws: Generator | None = None):
        super().__init__()
        self.level, self.prior, self.draws = level, prior, draws

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        if self.level:
            drawn = (torch.rand(len(y), generator=self.draws) < self.level).float()
            y = perturb_target(y, drawn, 1.0, prior=self.prior)
        p, q = torch.sigmoid(z).flatten(1), y.flatten(1)
        overlap = (2 * (p * q).sum(1) + 1) / (p.sum(1) + q.sum(1) + 1)
        return _bce(z, y).mean() + (1 - overlap).mean()


class SpatiallyVarying(nn.Module):
    """SVLS, Islam and Glocker, IPMI 2021: BCE on half the label, half its neighbours' mean.

    The eight neighbours weigh as a Gaussian of width 1 does. A special case of the kernel, whose
    prior is then a tensor.
    """

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return sc_bce_with_logits(z, y, 1.0, 0.5, prior=neighbour_mean(y))


def neighbour_mean(y: Tensor) -> Tensor:
    """Of (N, 1, H, W), the border repeated."""
    square = torch.tensor([[2.0, 1.0, 2.0], [1.0, 0.0, 1.0], [2.0, 1.0, 2.0]])
    weight = torch.exp(-square / 2) * (square > 0)
    weight = (weight / weight.sum()).reshape(1, 1, 3, 3)
    return F.conv2d(F.pad(y, (1, 1, 1, 1), mode="replicate"), weight).clamp(0, 1)


class OwnShare(nn.Module):
    """Moderation towards each sample's own share of positives, drawn per sample: a tensor prior."""

    def __init__(self, level: float, draws: Generator) -> None:
        super().__init__()
        self.level, self.draws = level, draws

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        drawn = (torch.rand(len(y), generator=self.draws) < self.level).float()
        share = y.mean(tuple(range(1, y.dim())), keepdim=True)
        return sc_bce_with_logits(z, y, drawn, 1.0, prior=share)


def mixed(
    inputs: Tensor, target: Tensor, concentration: float, draws: Generator
) -> tuple[Tensor, Tensor]:
    """mixup, Zhang et al., ICLR 2018: a batch and its own shuffle, in parts L and 1 - L.

    L has the distribution Beta(a, a), a the concentration; one for the batch, as the authors do.
    """
    gammas = torch._standard_gamma(torch.full((2,), concentration), generator=draws)
    share = float(gammas[0] / gammas.sum().clamp(min=1e-30))
    other = torch.randperm(len(inputs), generator=draws)
    parts = (share * x + (1 - share) * x[other] for x in (inputs, target))
    return next(parts), next(parts)
