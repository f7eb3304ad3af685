"""Hypothesis strategies: batches of logits and targets with levels, priors and masks."""

from typing import NamedTuple

import numpy as np
import torch
from devices import tensor
from hypothesis import strategies as st
from reference import largest
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MASKS = (torch.bool, torch.uint8, torch.int64, torch.int32, torch.int8)

shapes = st.one_of(
    st.just(()),
    st.tuples(st.integers(1, 5)),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(1, 3), st.integers(1, 3)),
)
betas = st.floats(0, 2)
inner = st.floats(0.001, 0.999)
seeds = st.integers(0, 2**32 - 1)


@st.composite
def pairs(draw):
    """alpha and beta as numbers that keep the label order"""
    beta = draw(betas)
    alpha = draw(st.floats(0, 1 if beta <= 1 else 1 / beta))
    return (alpha, beta) if alpha * beta <= 1 else (alpha * 0.999, beta)


class Batch(NamedTuple):
    input: Tensor
    target: Tensor
    soft: bool


@st.composite
def batches(draw, shape=shapes, soft=None, scale=None):
    """float64 logits, some extreme, and float64 targets, hard or soft"""
    size = draw(shape)
    rng = np.random.default_rng(draw(seeds))
    soft = draw(st.booleans()) if soft is None else soft
    spread = draw(st.sampled_from([1.0, 10.0, 1000.0])) if scale is None else scale
    input = tensor(rng.normal(0, spread, size))
    target = rng.random(size) if soft else rng.integers(0, 2, size).astype(np.float64)
    return Batch(input, tensor(target), soft)


@st.composite
def levels(draw, shape, high=1.0):
    """A level in one of its forms, with the NumPy array that it broadcasts to."""
    forms = ["number", "0-d"]
    if shape:
        forms += ["per sample", "broadcast", "full"]
    form = draw(st.sampled_from(forms))
    rng = np.random.default_rng(draw(seeds))
    if form in ("number", "0-d"):
        value = draw(st.floats(0, high))
        given = value if form == "number" else torch.tensor(value, dtype=torch.float64)
        return given, np.asarray(value)
    if form == "per sample":
        array = rng.uniform(0, high, shape[0])
        wide = array.reshape(shape[0], *(1 for _ in shape[1:]))
        return tensor(array), wide
    size = shape if form == "full" or len(shape) == 1 else (1, *shape[1:])
    array = rng.uniform(0, high, size)
    return tensor(array), array


@st.composite
def priors(draw, shape):
    """A prior in one of its forms, with the NumPy array that it broadcasts to."""
    forms = ["number", "0-d"]
    if shape:
        forms += ["full", "per label"] if len(shape) > 1 else ["full"]
    form = draw(st.sampled_from(forms))
    if form == "number":
        value = draw(inner)
        return value, np.asarray(value)
    # As pos_weight: from the last dimension, (C,) for (N, C) and (C, 1, 1) for (N, C, H, W).
    size = {"0-d": (), "full": shape, "per label": (*shape[1:2], *(1 for _ in shape[2:]))}[form]
    rng = np.random.default_rng(draw(seeds))
    array = rng.choice([0.0, 1.0, 0.02, 0.5, *rng.random(3)], size)
    return tensor(array), np.asarray(array)


class Given(NamedTuple):
    """Arguments of the loss, and the arrays that the reference takes for them."""

    arguments: dict
    alpha: np.ndarray
    beta: np.ndarray
    prior: np.ndarray

    @property
    def strength(self):
        return self.alpha * self.beta


@st.composite
def perturbations(draw, shape):
    """Alpha, beta and prior, each in any of its forms, that leave every target in [0, 1]."""
    prior, c = draw(priors(shape))
    high = np.minimum(largest(c), 2.0)
    if draw(st.booleans()):
        beta, b = None, high
    elif draw(st.booleans()):
        beta, b = draw(levels(shape, float(high.min())))
    else:
        beta = draw(st.floats(0, 1)) * float(high.min())
        b = np.asarray(beta)
    # Two numbers must keep the label order; of the others we only ask it.
    alpha, a = draw(levels(shape, min(1.0, 1 / max(float(b.max()), 1e-9)) * 0.999))
    return Given({"alpha": alpha, "beta": beta, "prior": prior}, a, b, c)
