"""The drop-in loss: its configuration and its draws; the functional layer computes the loss."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from .. import _batch, _checks
from .._checks import sentence
from ..functional import perturbed_loss, sc_bce_with_logits

__all__ = ["SCBCEWithLogitsLoss"]

_FIRST = 4  # training batches whose floating-point labels are all checked, on a CPU

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
        alpha: perturbation probability, in [0, 1]. Default: 0.
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
        ignore_index: elements whose target has this value are left out of the loss. Default:
            None.
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
        ignore_index: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        remedy = f"for label smoothing write `{type(self).__name__}.label_smoothing({{}})`"
        _checks.tensor_or_none("weight", weight, remedy)
        _checks.tensor_or_none("pos_weight", pos_weight, "pass `torch.tensor({})`")
        super().__init__(weight, size_average, reduce, reduction, pos_weight)
        _checks.reduction(self.reduction)
        for name, value, high in (("alpha", alpha, 1.0), ("beta", beta, 2.0)):
            if not (name == "beta" and value is None):
                _checks.number(name, value, 0.0, high)
        beta = _batch.require_numbers(alpha, beta, prior, every=True)  # type: ignore[assignment]
        _checks.sampling(sampling)
        _require_noise(noise, beta, prior, sampling)
        _checks.generator(generator)
        self.alpha = float(alpha)
        # None is the largest for each element of a prior that is a tensor.
        self.beta = None if beta is None else float(beta)
        _batch.hold_prior(self, prior)
        self._given = prior.detach().clone().float() if isinstance(prior, Tensor) else None
        self.sampling = sampling
        self.noise = float(noise)
        self.ignore_index = _checks.ignore_index(ignore_index)
        self.generator = generator
        self._looked = 0  # training batches whose labels were all checked
        self._warned = False
        _require_lessons(self)

    if not TYPE_CHECKING:

        @functools.wraps(__init__)  # whose signature it shows
        def __new__(cls, *args: Any, **kwargs: Any) -> SCBCEWithLogitsLoss:
            for name in kwargs.keys() & _SETTINGS:
                if cls.__init__ is SCBCEWithLogitsLoss.__init__:
                    raise TypeError(
                        f"{cls.__name__}() has no argument `{name}`; write "
                        f"`{cls.__name__}.{name}({kwargs[name]!r})`"
                    )
            return super().__new__(cls)

    @classmethod
    def label_smoothing(cls: type[Loss], eps: float, **kwargs: Any) -> Loss:
        """Label smoothing as Keras defines it: the target of a positive is 1 - eps/2.

        With ``prior`` c the target of a negative is eps c, that of a positive 1 - eps (1 - c).

        Args:
            eps: amount of smoothing, in [0, 1).
            **kwargs: other arguments of the constructor, such as ``prior`` or ``pos_weight``.

        References:
            Szegedy et al., CVPR 2016, Section 7.

        Example:
            >>> from sc_bce import SCBCEWithLogitsLoss
            >>> SCBCEWithLogitsLoss.label_smoothing(0.1).flip_rates  # targets 0.05 and 0.95
            (tensor(0.0500), tensor(0.0500))
        """
        _checks.number("eps", eps, 0.0, 1.0)
        return cls(alpha=1.0, beta=eps, **kwargs)

    @classmethod
    def disturb_label(
        cls: type[Loss], rate: float, sampling: str = "element", **kwargs: Any
    ) -> Loss:
        """DisturbLabel: with probability ``rate`` a label is replaced by a random one.

        The random label is 0 or 1 with equal probability, so half of the replaced labels change.

        Args:
            rate: noise rate, in [0, 1).
            sampling: ``"element"`` or ``"sample"``, as in the constructor. Default:
                ``"element"``.
            **kwargs: other arguments of the constructor.

        References:
            Xie et al., CVPR 2016, arXiv 1605.00055.

        Example:
            >>> from sc_bce import SCBCEWithLogitsLoss
            >>> criterion = SCBCEWithLogitsLoss.disturb_label(0.2)
            >>> criterion.alpha, criterion.beta, criterion.sampling
            (0.1, 2.0, 'element')
        """
        _checks.number("rate", rate, 0.0, 1.0)
        _require_half("disturb_label", kwargs)
        return cls(alpha=rate / 2, beta=2.0, sampling=sampling, **kwargs)

    @classmethod
    def hard_inversion(cls: type[Loss], alpha: float, **kwargs: Any) -> Loss:
        """Hard inversion: with probability ``alpha`` all labels of a sample are flipped.

        Args:
            alpha: perturbation probability, in [0, 1/2).
            **kwargs: other arguments of the constructor.

        References:
            Liu et al., ICCV 2023, arXiv 2307.13539 (HI).

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
        _require_half("hard_inversion", kwargs)
        return cls(alpha=alpha, beta=2.0, **{"sampling": "sample", **kwargs})

    @classmethod
    def soft_inversion(cls: type[Loss], alpha: float, **kwargs: Any) -> Loss:
        """Soft inversion: with probability ``alpha`` a sample's 1 becomes 1/4, its 0 becomes 3/4.

        Args:
            alpha: perturbation probability, in [0, 2/3).
            **kwargs: other arguments of the constructor.

        References:
            Liu et al., ICCV 2023, arXiv 2307.13539 (SI).

        Example:
            >>> from sc_bce import SCBCEWithLogitsLoss
            >>> SCBCEWithLogitsLoss.soft_inversion(0.2).flip_rates  # 0.2 * 1.5 / 2 each
            (tensor(0.1500), tensor(0.1500))
        """
        _require_half("soft_inversion", kwargs)
        return cls(alpha=alpha, beta=1.5, **{"sampling": "sample", **kwargs})

    @classmethod
    def moderation(cls: type[Loss], alpha: float, **kwargs: Any) -> Loss:
        """Moderation: with probability ``alpha`` all labels of a sample become ``prior``.

        Args:
            alpha: perturbation probability, in [0, 1).
            **kwargs: other arguments of the constructor, such as ``prior``.

        References:
            Liu et al., ICCV 2023, arXiv 2307.13539 (M, at ``prior=0.5``).

        Example:
            >>> from sc_bce import SCBCEWithLogitsLoss
            >>> SCBCEWithLogitsLoss.moderation(0.2, prior=0.02).flip_rates
            (tensor(0.0040), tensor(0.1960))
        """
        return cls(alpha=alpha, beta=1.0, **{"sampling": "sample", **kwargs})

    @classmethod
    def dynamic_moderation(cls: type[Loss], alpha: float, **kwargs: Any) -> Loss:
        """Dynamic moderation: perturbed labels are 1/2 plus truncated normal noise.

        Args:
            alpha: perturbation probability, in [0, 1).
            **kwargs: other arguments of the constructor; ``noise`` bounds the noise, by default
                at 1/4.

        References:
            Liu et al., ICCV 2023, arXiv 2307.13539 (DM).

        Example:
            >>> from sc_bce import SCBCEWithLogitsLoss
            >>> criterion = SCBCEWithLogitsLoss.dynamic_moderation(0.2)
            >>> criterion.beta, criterion.noise, criterion.sampling
            (1.0, 0.25, 'sample')
        """
        _require_half("dynamic_moderation", kwargs)
        return cls(alpha=alpha, beta=1.0, **{"sampling": "sample", "noise": 0.25, **kwargs})

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
        prior = _batch.flat(self.prior)
        beta = 1 / torch.maximum(prior, 1 - prior) if self.beta is None else self.beta
        return self.alpha * beta * prior, self.alpha * beta * (1 - prior)

    @property
    def flip_rate(self) -> Tensor:
        """The flip rate alpha beta / 2 that both labels share at ``prior=0.5``.

        Raises:
            ValueError: another prior, whose two rates differ.

        Example:
            >>> from sc_bce import SCBCEWithLogitsLoss
            >>> SCBCEWithLogitsLoss.label_smoothing(0.1).flip_rate
            tensor(0.0500)
        """
        return _batch.single_flip_rate(self.flip_rates, self.prior)

    def _apply(self: Loss, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Loss:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._given is not None and isinstance(self.prior, Tensor):
            # Follow the device only: a cast would round it, and `to_empty` leaves it unfilled.
            self.prior = self._given.to(self.prior.device)
        return self

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        if self.alpha == 0 or not (self.training and torch.is_grad_enabled()):
            loss = sc_bce_with_logits(
                input,
                target,
                weight=self.weight,
                pos_weight=self.pos_weight,
                ignore_index=self.ignore_index,
                reduction=self.reduction,
            )
            misplaced = self.alpha > 0 and not self.training and not self._warned
            return _batch.on_backward(loss, self._warn_of_eval) if misplaced else loss
        # All checks come before the draw: a refused batch must not advance the generator.
        eager = not torch.compiler.is_compiling()
        every = eager and self._looked < _FIRST
        batch = _batch.prepare(input, target, self.ignore_index, every)
        if every:
            self._looked += 1
        alpha: float | Tensor = self.alpha
        beta: float | Tensor | None = self.beta
        if self.sampling != "expected":
            alpha = _batch.bernoulli(self.alpha, input, self.sampling, self.generator)
            if self.sampling == "sample" and not eager:
                alpha = _batch.once(alpha)
            if self.noise > 0:
                noise = _batch.truncated_normal(input, self.noise, self.generator)
                beta = self.beta + 2 * noise  # type: ignore[operator]
        given = _batch.perturbation(alpha, beta, self.prior, input.size())
        return perturbed_loss(batch, given, self.weight, self.pos_weight, self.reduction)

    def _warn_of_eval(self) -> None:
        if not self._warned:
            self._warned = True
            _checks.warn(_checks.TRAINED_IN_EVAL.format(type(self).__name__))

    def extra_repr(self) -> str:
        shown = [f"alpha={self.alpha}", f"beta={self.beta}", _batch.shown_prior(self.prior)]
        shown.append(f"sampling={self.sampling!r}")
        if self.noise:
            shown.append(f"noise={self.noise}")
        if self.ignore_index is not None:
            shown.append(f"ignore_index={self.ignore_index}")
        return ", ".join([*shown, f"reduction={self.reduction!r}"])


_SETTINGS = {
    name for name, value in vars(SCBCEWithLogitsLoss).items() if isinstance(value, classmethod)
}


def _require_half(setting: str, kwargs: dict[str, Any]) -> None:
    prior = kwargs.get("prior", 0.5)
    if isinstance(prior, Tensor) or prior != 0.5:
        wanted = f"be 1/2, which {setting} is defined by"
        remedy = "use moderation or label_smoothing"
        raise ValueError(sentence("prior", wanted, prior, remedy))


def _require_noise(noise: object, beta: float | None, prior: object, sampling: str) -> None:
    if noise == 0:
        return
    if isinstance(prior, Tensor) or prior != 0.5 or beta is None:
        raise ValueError(sentence("prior", "be 1/2 if noise is drawn", prior, "drop `noise`"))
    _checks.number("noise", noise, 0.0, min(beta, 2.0 - beta) / 2)
    if sampling == "expected":
        wanted = "be 'sample' or 'element' if noise is drawn"
        remedy = "the expectation has no noise, so drop `noise` or draw"
        raise ValueError(sentence("sampling", wanted, "'expected'", remedy))


def _require_lessons(loss: SCBCEWithLogitsLoss) -> None:
    """Refuse a perturbation that leaves no information, or one side of 1/2 only."""
    values = (loss.prior, loss.pos_weight)
    if any(isinstance(value, Tensor) and not _batch.readable(value) for value in values):
        return
    # In the prior's own shape, which broadcasts with pos_weight.
    shape = loss.prior.shape if isinstance(loss.prior, Tensor) else ()
    up, down = (rate.double().reshape(shape) for rate in loss.flip_rates)
    if bool((up + down > 1 - 1e-6).any()):
        got = f"alpha * beta = {float((up + down).max()):g}, which loses the order of the labels"
        raise ValueError(sentence("alpha", "be below 1 / beta", got, "lower one of them"))
    weight = 1.0 if loss.pos_weight is None else loss.pos_weight
    if isinstance(weight, Tensor):
        try:
            torch.broadcast_shapes(weight.shape, shape)  # type: ignore[no-untyped-call]
        except RuntimeError:
            got = f"shape {tuple(weight.shape)}"
            wanted = f"broadcast with `prior` of shape {tuple(shape)}"
            raise ValueError(sentence("pos_weight", wanted, got)) from None
    negative, positive = weight * up / (1 - up), weight * (1 - down) / down
    if bool((negative >= 1).any()):
        kind, odds = "negative", float(negative.max())
    elif bool((positive <= 1).any()):
        kind, odds = "positive", float(positive.min())
    else:
        return
    other = "positive" if kind == "negative" else "negative"
    raise ValueError(
        sentence(
            "alpha", f"leave a sure {kind} on its side of 1/2",
            f"alpha={loss.alpha:g}, beta={loss.beta}, {_batch.named('prior', loss.prior)} and "
            f"{_batch.named('pos_weight', loss.pos_weight)}, with which its best answer has odds "
            f"{odds:.3g} and is called {other}",
            "lower alpha or pos_weight, or set `prior` to the base rate of the positives",
        )
    )  # fmt: skip
