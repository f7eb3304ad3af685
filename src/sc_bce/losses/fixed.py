"""The drop-in loss: a fixed perturbation, its settings and its draw."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .. import _errors, _inputs
from .._errors import refuse
from .._torch import on_backward, readable
from ..functional import perturbed_loss, sc_bce_with_logits
from . import mistakes
from .draws import bernoulli, materialized, truncated_normal

__all__ = ["SCBCEWithLogitsLoss"]

Loss = TypeVar("Loss", bound="SCBCEWithLogitsLoss")


class SCBCEWithLogitsLoss(nn.BCEWithLogitsLoss):
    r"""Binary cross entropy with label smoothing or random label perturbation (SC-BCE).

    A drop-in replacement for :class:`torch.nn.BCEWithLogitsLoss` whose softer targets lower the
    confidence of the network:

    .. math::
        \ell(x, y) = \mathrm{BCE}(x, q), \qquad q = y + \alpha\beta\,(c - y)

    with :math:`x` the logit, :math:`y` the target, :math:`\alpha` the probability that a label is
    perturbed, :math:`\beta` the strength of the perturbation
    :math:`p(y) = (1-\beta)\,y + \beta c` and :math:`c` the prior that it moves towards. This is
    the expectation. With ``sampling`` the labels are drawn: each is :math:`p(y)` with probability
    :math:`\alpha` and :math:`y` otherwise. In evaluation mode, or without gradients, the loss is
    plain BCE on the unperturbed labels, so that validation losses of all methods are comparable.

    Special cases: ``alpha=0`` (the default) is :class:`torch.nn.BCEWithLogitsLoss`, bit for bit.
    The named settings :meth:`label_smoothing`, :meth:`disturb_label`, :meth:`hard_inversion`,
    :meth:`soft_inversion`, :meth:`moderation` and :meth:`dynamic_moderation` build the others.

    Args:
        weight: as in torch, rescales the loss of each element. Default: None.
        size_average: deprecated, as in torch. Default: None.
        reduce: deprecated, as in torch. Default: None.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``. Default: ``"mean"``.
        pos_weight: as in torch, the weight of positive examples. Default: None.
        alpha: perturbation probability, in [0, 1]; it may be assigned later. Default: 0.
        beta: perturbation strength, in [0, 1 / max(prior, 1 - prior)]; ``alpha * beta`` must be
            below 1. None takes the largest: 2 at ``prior=0.5``. Default: None.
        prior: what perturbed labels move towards: a number between 0 and 1, or a tensor that
            broadcasts to ``input`` from the last dimension: (C,) for (N, C), (C, 1, 1) for
            (N, C, H, W). The base rate of the positives keeps the mean probability; 1/2, as in
            the paper, keeps the decision threshold. Read once: build a new loss for another.
            Default: 1/2.
        sampling: ``"expected"`` uses the effective target ``q``; ``"sample"`` draws once per
            sample (dimension 0), ``"element"`` once per element. Default: ``"expected"``.
        noise: bound of the noise n of dynamic moderation, a standard normal truncated to
            [-noise, noise] that makes the strength of each drawn element beta + 2n. It needs
            draws and ``prior=0.5``; at most ``min(beta, 2 - beta) / 2``. Default: 0.
        ignore_index: elements whose target has this value, an int or ``math.nan``, are left out
            of the loss. Default: None.
        generator: source of the draws, on the device of the input; None is torch's global one.
            Its state is not in ``state_dict``. Default: None.

    Attributes:
        flip_rates: the pair (g0, g1) = (alpha beta c, alpha beta (1 - c)). A perfect fit predicts
            g0 for a negative and 1 - g1 for a positive.

    Shape:
        - input: :math:`(N, *)` or scalar, floating point.
        - target: the same; bool, integer (0 and 1) or floating point in [0, 1].
        - Returns: scalar, or the shape of ``input`` for ``reduction="none"``.

    Raises:
        ValueError: at construction, a number is out of its range; ``alpha * beta`` is 1 or more,
            which removes all information from the labels; the perturbation, together with
            ``pos_weight``, moves every prediction to one side of 1/2; ``reduction`` or
            ``sampling`` is unknown; ``noise`` is given without drawing. In use, as
            :func:`sc_bce_with_logits`.
        TypeError: an argument has the wrong type.

    Note:
        ``state_dict`` has torch's keys only. A ``generator`` does not work with
        ``torch.compile(fullgraph=True)``; in several processes, give each a different seed. A
        prior other than 1/2 moves the decision threshold: P(y = 1) >= 1/2 becomes
        ``sigmoid(x) >= (1 - s) / 2 + s * c`` with s = alpha * beta.

        Labels are perturbed in training mode with gradients only. A training loss that is logged
        under ``no_grad`` is therefore plain BCE. The same holds for the first forward of
        reentrant activation checkpointing; the gradients come from the second, which is
        perturbed. For the expected loss on other data, call :func:`sc_bce_with_logits`.

    References:
        Liu et al., ICCV 2023, arXiv 2307.13539 (SC-BCE and its special cases).
        Xie et al., CVPR 2016, arXiv 1605.00055 (DisturbLabel).

    Example:
        >>> import torch
        >>> from sc_bce import SCBCEWithLogitsLoss
        >>> criterion = SCBCEWithLogitsLoss(alpha=0.05)
        >>> criterion
        SCBCEWithLogitsLoss(alpha=0.05, beta=2.0, prior=0.5, sampling='expected', reduction='mean')
        >>> logits = torch.tensor([2.0, -1.0], requires_grad=True)
        >>> criterion(logits, torch.tensor([1.0, 0.0])).detach()
        tensor(0.2951)
        >>> criterion.flip_rates
        (tensor(0.0500), tensor(0.0500))
        >>> SCBCEWithLogitsLoss.moderation(0.2, prior=0.02).flip_rates
        (tensor(0.0040), tensor(0.1960))
    """

    prior: float | Tensor

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        pos_weight: Tensor | None = None,
        *,
        alpha: float = 0.0,
        beta: float | None = None,
        prior: float | Tensor = 0.5,
        sampling: str = "expected",
        noise: float = 0.0,
        ignore_index: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        remedy = f"for label smoothing write `{type(self).__name__}.label_smoothing({{}})`"
        _errors.tensor_or_none("weight", weight, remedy)
        _errors.tensor_or_none("pos_weight", pos_weight)
        super().__init__(weight, size_average, reduce, reduction, pos_weight)
        _errors.choice("reduction", self.reduction, ("none", "mean", "sum"))
        _errors.number("alpha", alpha, 0.0, 1.0)
        if beta is not None:
            _errors.number("beta", beta, 0.0, 2.0)
        beta = _inputs.ranges(alpha, beta, prior, every=True)  # type: ignore[assignment]
        _errors.choice("sampling", sampling, ("expected", "sample", "element"))
        if noise != 0:
            _require_half(" if noise is drawn", prior, "drop `noise`")
            _errors.number("noise", noise, 0.0, min(beta, 2.0 - beta) / 2)  # type: ignore[type-var,operator]
            if sampling == "expected":
                remedy = "the expectation has no noise, so drop `noise` or draw"
                refuse("sampling", "be 'sample' or 'element' with noise", "'expected'", remedy)
        # None is the largest for each element of a prior that is a tensor.
        self.beta = None if beta is None else float(beta)
        self._given = _inputs.prior_buffer(prior) if isinstance(prior, Tensor) else None
        if self._given is None:
            self.prior = float(prior)
        else:
            self.register_buffer("prior", self._given.clone(), persistent=False)
        self.sampling = sampling
        self.noise = float(noise)
        self.ignore_index = _errors.ignored(ignore_index)
        self.generator = generator
        self._looks = mistakes.LOOKS
        self.alpha = alpha

    @property
    def alpha(self) -> float:
        return self._alpha

    @alpha.setter
    def alpha(self, value: float) -> None:
        _errors.number("alpha", value, 0.0, 1.0)
        _require_lessons(self, value)
        self._alpha = float(value)

    @classmethod
    def label_smoothing(cls: type[Loss], eps: float, **kwargs: Any) -> Loss:
        """Label smoothing as Keras defines it: the target of a positive is 1 - eps/2.

        With ``prior`` c the target of a negative is eps c, that of a positive 1 - eps (1 - c).
        ``eps`` is in [0, 1). (Szegedy et al., CVPR 2016, Section 7.)

        Example:
            >>> from sc_bce import SCBCEWithLogitsLoss
            >>> SCBCEWithLogitsLoss.label_smoothing(0.1).flip_rates  # targets 0.05 and 0.95
            (tensor(0.0500), tensor(0.0500))
        """
        _errors.number("eps", eps, 0.0, 1.0)
        return cls(alpha=1.0, beta=eps, **kwargs)

    @classmethod
    def disturb_label(
        cls: type[Loss], rate: float, sampling: str = "element", **kwargs: Any
    ) -> Loss:
        """DisturbLabel: with probability ``rate``, in [0, 1), a label is replaced by a random one.

        The random label is 0 or 1 with equal probability, so half of the replaced labels change.
        (Xie et al., CVPR 2016, arXiv 1605.00055.)

        Example:
            >>> from sc_bce import SCBCEWithLogitsLoss
            >>> criterion = SCBCEWithLogitsLoss.disturb_label(0.2)
            >>> criterion.alpha, criterion.beta, criterion.sampling
            (0.1, 2.0, 'element')
        """
        _errors.number("rate", rate, 0.0, 1.0)
        return _around_half(cls, "disturb_label", rate / 2, 2.0, sampling=sampling, **kwargs)

    @classmethod
    def hard_inversion(cls: type[Loss], alpha: float, **kwargs: Any) -> Loss:
        """Hard inversion (HI): all labels of a sample are flipped with probability ``alpha`` < 1/2.

        Example:
            >>> import torch
            >>> from sc_bce import SCBCEWithLogitsLoss
            >>> _ = torch.manual_seed(0)
            >>> criterion = SCBCEWithLogitsLoss.hard_inversion(0.3, reduction="none")
            >>> logits = torch.full((100, 1), 2.0, requires_grad=True)
            >>> loss = criterion(logits, torch.ones(100, 1)).detach()
            >>> loss.round(decimals=4).unique()  # under the label, and under the flipped label
            tensor([0.1269, 2.1269])
        """
        return _around_half(cls, "hard_inversion", alpha, 2.0, **kwargs)

    @classmethod
    def soft_inversion(cls: type[Loss], alpha: float, **kwargs: Any) -> Loss:
        """Soft inversion (SI): with probability ``alpha`` < 2/3 a sample's 1 becomes 1/4, 0 3/4.

        Example:
            >>> from sc_bce import SCBCEWithLogitsLoss
            >>> SCBCEWithLogitsLoss.soft_inversion(0.2).flip_rates  # 0.2 * 1.5 / 2 each
            (tensor(0.1500), tensor(0.1500))
        """
        return _around_half(cls, "soft_inversion", alpha, 1.5, **kwargs)

    @classmethod
    def moderation(cls: type[Loss], alpha: float, **kwargs: Any) -> Loss:
        """Moderation (M): all labels of a sample become ``prior`` with probability ``alpha`` < 1.

        Example:
            >>> from sc_bce import SCBCEWithLogitsLoss
            >>> SCBCEWithLogitsLoss.moderation(0.2, prior=0.02).flip_rates
            (tensor(0.0040), tensor(0.1960))
        """
        return cls(alpha=alpha, beta=1.0, **{"sampling": "sample", **kwargs})

    @classmethod
    def dynamic_moderation(cls: type[Loss], alpha: float, **kwargs: Any) -> Loss:
        """Dynamic moderation (DM): moderation towards 1/2 plus noise, of at most 1/4 by default.

        Example:
            >>> from sc_bce import SCBCEWithLogitsLoss
            >>> criterion = SCBCEWithLogitsLoss.dynamic_moderation(0.2)
            >>> criterion.beta, criterion.noise, criterion.sampling
            (1.0, 0.25, 'sample')
        """
        return _around_half(cls, "dynamic_moderation", alpha, 1.0, **{"noise": 0.25, **kwargs})

    @property
    def flip_rates(self) -> tuple[Tensor, Tensor]:
        """The pair (g0, g1) = (s c, s (1 - c)) with s = alpha beta: 0-d, or (C,) for C priors.

        Pass it to :class:`TemperatureScaling` to remove the flip after training.

        Example:
            >>> import torch
            >>> from sc_bce import SCBCEWithLogitsLoss
            >>> rates = torch.tensor([0.5, 0.1])  # base rates of two labels
            >>> SCBCEWithLogitsLoss.label_smoothing(0.1, prior=rates).flip_rates
            (tensor([0.0500, 0.0100]), tensor([0.0500, 0.0900]))
        """
        return _flip_rates(self, self.alpha)

    def _apply(self: Loss, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Loss:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._given is not None and isinstance(self.prior, Tensor):
            # Follow the device only: a cast would round it, and `to_empty` leaves it unfilled.
            self.prior = self._given.to(self.prior.device)
        return self

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        learns = self.training and torch.is_grad_enabled()
        if learns and not torch.compiler.is_compiling() and self._looks:  # in this order: a guard
            self._looks -= 1
            mistakes.warn_of_probabilities(input)
        weights: dict[str, Any] = {"weight": self.weight, "pos_weight": self.pos_weight}
        weights["reduction"] = self.reduction
        if self.alpha == 0 or not learns:
            loss = sc_bce_with_logits(input, target, ignore_index=self.ignore_index, **weights)
            misplaced = self.alpha > 0 and not self.training
            return on_backward(loss, mistakes.warn_of_eval) if misplaced else loss
        # All checks come before the draw: a refused batch must not advance the generator.
        batch = _inputs.batch(input, target, self.ignore_index)
        alpha: float | Tensor = self.alpha
        beta: float | Tensor | None = self.beta
        if self.sampling != "expected":
            alpha = bernoulli(self.alpha, input, self.sampling, self.generator)
            if self.sampling == "sample" and torch.compiler.is_compiling():
                alpha = materialized(alpha)
            if self.noise > 0:
                beta = self.beta + 2 * truncated_normal(input, self.noise, self.generator)  # type: ignore[operator]
        given = _inputs.perturbation(alpha, beta, self.prior, input.size())
        return perturbed_loss(batch, given, **weights)[0]

    def extra_repr(self) -> str:
        prior = tuple(self.prior.shape) if isinstance(self.prior, Tensor) else self.prior
        shown = [f"alpha={self.alpha}, beta={self.beta}, prior={prior}, sampling={self.sampling!r}"]
        if self.noise:
            shown.append(f"noise={self.noise}")
        if self.ignore_index is not None:
            shown.append(f"ignore_index={self.ignore_index}")
        return ", ".join([*shown, f"reduction={self.reduction!r}"])


def _flip_rates(loss: SCBCEWithLogitsLoss, alpha: float) -> tuple[Tensor, Tensor]:
    prior = _inputs.flat_prior(loss.prior)
    beta = 1 / torch.maximum(prior, 1 - prior) if loss.beta is None else loss.beta
    return alpha * beta * prior, alpha * beta * (1 - prior)


def _around_half(
    cls: type[Loss], setting: str, alpha: float, beta: float, /, **kwargs: Any
) -> Loss:
    """A setting that the prior 1/2 is a part of, drawn by sample unless another way is named."""
    remedy = "use moderation or label_smoothing"
    _require_half(f", which {setting} is defined by", kwargs.get("prior", 0.5), remedy)
    return cls(alpha=alpha, beta=beta, **{"sampling": "sample", **kwargs})


def _require_half(why: str, prior: object, remedy: str) -> None:
    if isinstance(prior, Tensor) or prior != 0.5:
        refuse("prior", f"be 1/2{why}", prior, remedy)


def _require_lessons(loss: SCBCEWithLogitsLoss, alpha: float) -> None:
    """Refuse a perturbation that leaves no information, or one side of 1/2 only."""
    prior, weight = loss.prior, loss.pos_weight
    if any(isinstance(value, Tensor) and not readable(value) for value in (prior, weight)):
        return
    # In the prior's own shape, which broadcasts with pos_weight.
    shape = prior.shape if isinstance(prior, Tensor) else ()
    up, down = (rate.double().reshape(shape) for rate in _flip_rates(loss, alpha))
    if bool((up + down > 1 - 1e-6).any()):
        got = f"alpha * beta = {float((up + down).max()):g}, which loses the order of the labels"
        refuse("alpha", "be below 1 / beta", got, "lower one of them")
    odds = torch.ones((), device="cpu") if weight is None else weight
    negative, positive = odds * up / (1 - up), odds * (1 - down) / down
    for kind, other, wrong, answer in (
        ("negative", "positive", negative >= 1, negative.max()),
        ("positive", "negative", positive <= 1, positive.min()),
    ):
        if bool(wrong.any()):
            refuse(
                "alpha", f"leave a sure {kind} on its side of 1/2",
                f"alpha={alpha:g} and beta={loss.beta}, with which its best answer, with the "
                f"prior and pos_weight, has odds {float(answer):.3g} and is called {other}",
                "lower alpha or pos_weight, or set `prior` to the base rate of the positives",
            )  # fmt: skip
