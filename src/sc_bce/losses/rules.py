r"""The rules: how measured calibration moves the levels. No module, no table, no state.

Both rules work on the same quantities: the strength :math:`\beta`, the prior :math:`c`, and the
cap of a level, :func:`cap`, which keeps both labels on their side of 1/2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _errors

_MARGIN = 0.01  # below the level that would take a label to 1/2


def cap(beta: float, prior: float | Tensor) -> float:
    """The highest level, min(1, 1 / (2 max(c, 1 - c) beta) - 0.01), at every element of c."""
    if isinstance(prior, Tensor):
        prior = float(torch.maximum(prior, 1 - prior).max())
    return min(1.0, 1 / (2 * max(prior, 1 - prior) * beta) - _MARGIN)


def base_rate(elements: Tensor, positives: Tensor) -> Tensor:
    """(N+ + 1/2) / (N + 1), label by label."""
    return (positives + 0.5) / (elements + 1)


@dataclass(frozen=True)
class FollowSlope:
    r"""The default: the calibration slope moves the mean level, difficulty shares it out.

    At each step, with :math:`b` the calibration slope of the validation logits (below 1:
    over-confident), the mean level is

    .. math::
        a \leftarrow \mathrm{clip}\big(a + \tfrac{0.1}{\beta}\,\mathrm{clip}(1 - b, -1, 1),\,
        0,\, \mathrm{cap}\big)

    from ``level`` on. With :math:`\bar A_i` the running mean of the accuracy on sample :math:`i`
    in training, its level is

    .. math::
        \alpha_i = \min(a\, w_i, \mathrm{cap}), \qquad w_i = (1 - \bar A_i)^{\mathrm{focus}} /
        \mathrm{mean}_j (1 - \bar A_j)^{\mathrm{focus}}

    with the mean over the rows trained so far. Rows never trained have :math:`w_i = 1`.
    """

    level: float = 0.2
    focus: float = 1.0

    gain = 0.1
    """change of the mean strength at a slope that is off by 1"""
    memory = 0.9
    """weight of the past in a sample's running accuracy, at each visit"""
    unknown = 0.5
    """accuracy of a sample before its first visit"""

    def __post_init__(self) -> None:
        _errors.number("level", self.level, 0.0, 1.0)
        _errors.number("focus", self.focus, 0.0, 100.0)

    def after_step(self, mean: float, slope: float, beta: float, highest: float) -> float:
        """The mean level after a step; a slope that could not be fitted changes nothing."""
        if not math.isnan(slope):
            mean += self.gain / beta * min(max(1 - slope, -1.0), 1.0)
        return min(max(mean, 0.0), highest)

    def levels(self, mean: float, highest: float, accuracy: Tensor, trained: Tensor) -> Tensor:
        """The level of each row."""
        weight = self.hardness(accuracy)
        # If every sample is perfect, all are alike: a division by 0 counts as 1.
        weight = (weight / weight[trained].mean()).nan_to_num_(1.0, 1.0)
        return torch.where(trained, weight, 1.0).mul_(mean).clamp_(max=highest)

    def hardness(self, accuracy: Tensor) -> Tensor:
        return (1 - accuracy).pow_(self.focus)

    def remembered(self, accuracy: Tensor, hits: Tensor) -> Tensor:
        """The running accuracy after one more visit."""
        return torch.lerp(accuracy, hits, 1 - self.memory)


@dataclass(frozen=True)
class Climb:
    r"""The paper's rule: each level climbs on the loss that the network descends on.

    .. math::
        \alpha_i \leftarrow \mathrm{clip}\big(\alpha_i + \eta\,(\bar s_i + \lambda R_i),\,
        0,\, \mathrm{cap}\big), \qquad \bar s_i = \mathrm{mean}\,[\beta\,(y_i - c)\, x_i]

    in each batch, with :math:`\eta` the ``lr``, :math:`\lambda` the ``penalty`` and the constraint

    - ``"calibration"`` (MC): :math:`R_i = \min(1 - A - \kappa\alpha_i, 0)`, :math:`A` the
      validation accuracy and :math:`\kappa` the confidence that a level of 1 costs, the mean of
      :math:`\beta(1 - c)` over positives and :math:`\beta c` over negatives (:math:`\beta/2` at
      :math:`c = \tfrac12`): the expected confidence of the target then equals the accuracy.
    - ``"max_entropy"`` (MEI): :math:`R = \min(A - A_\mathrm{best}, 0)`, the most entropy that
      keeps the best accuracy so far.

    References:
        Liu et al., ICCV 2023, arXiv 2307.13539; ``lr`` and ``penalty`` of its official code.
    """

    objective: str = "calibration"
    lr: float = 0.002
    penalty: float = 2000.0

    def __post_init__(self) -> None:
        _errors.choice("objective", self.objective, ("calibration", "max_entropy"))
        _errors.positive("lr", self.lr)
        _errors.number("penalty", self.penalty, 0.0, _errors.LARGE)

    def cost(
        self, beta: float, prior: float | Tensor, elements: Tensor, positives: Tensor
    ) -> float | Tensor:
        """Kappa, from the numbers of elements and positives, label by label; 0 before any."""
        if not isinstance(prior, Tensor) and prior == 0.5:
            return beta / 2
        c = prior.reshape(-1) if isinstance(prior, Tensor) else prior
        lost = positives * (1 - c) + (elements - positives) * c
        return beta * lost.sum() / elements.sum().clamp(min=1)

    def climbed(
        self, alpha: Tensor, slope: Tensor, cost: float | Tensor, accuracy: Tensor, best: Tensor
    ) -> Tensor:
        """The levels after a batch, before they are clipped to [0, cap].

        ``slope`` includes beta. A step that is not finite moves nothing, nor does a cost of 0.
        """
        if self.objective == "max_entropy":
            over = accuracy - best
        elif isinstance(cost, Tensor):
            over = 1 - accuracy - cost * alpha
        else:
            over = torch.sub(1 - accuracy, alpha, alpha=cost)
        gain = torch.add(slope, over.clamp(max=0), alpha=self.penalty)
        new = torch.add(alpha, gain, alpha=self.lr)
        moves = new * 0 == 0  # finite, in two calls
        if isinstance(cost, Tensor):
            moves = moves & (cost > 0)
        return torch.where(moves, new, alpha)
