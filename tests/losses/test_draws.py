"""The draws: their probabilities, moments and independence, in every dtype and size."""

import math

import numpy as np
import pytest
import torch
from devices import seeded
from strategies import FLOATS
from torch._subclasses.fake_tensor import FakeTensorMode

from sc_bce.losses.draws import bernoulli, materialized, truncated_normal

# Draws made one by one, and from random bytes; on other devices all are of the first kind.
FEW, MANY = 1 << 10, 1 << 20


@pytest.mark.parametrize("alpha", [0.0, 1e-3, 0.05, 0.25, 63.5 / 64, 1.0])
def test_draws_by_bytes_have_the_probability(alpha):
    """Within five deviations, for a number and for one level per row; 0 and 1 exactly."""
    count = 1 << 20
    for level in (alpha, torch.tensor([alpha, 0.5 * alpha])):
        drawn = bernoulli(level, torch.empty(2, count // 2), "element", None)
        assert drawn.dtype == torch.bool
        for row, want in zip(drawn, [alpha, alpha / (1 if level is alpha else 2)], strict=True):
            bound = 5 * math.sqrt(want * (1 - want) * 2 / count)
            assert abs(float(row.double().mean()) - want) <= bound


@pytest.mark.parametrize("size", [FEW, MANY])
def test_probabilities_of_0_and_1_are_certain(size):
    """Also where a uniform number is 0, or a byte ties with the first of the probability."""
    for alpha in (0.0, 1.0):
        for level in (alpha, torch.tensor(alpha), torch.full((size,), alpha)):
            for sampling in ("sample", "element"):
                drawn = bernoulli(level, torch.empty(size), sampling, None)
                assert bool(drawn.all() if alpha else not drawn.any())


@pytest.mark.parametrize("size", [FEW, MANY])
@pytest.mark.parametrize("alpha", [1 / 256, 1.5 / 256, 0.5, 0.7, 255.5 / 256])
def test_a_draw_has_its_probability_at_every_size(size, alpha):
    runs = MANY // size
    drawn = [bernoulli(alpha, torch.empty(size), "element", None) for _ in range(runs)]
    assert abs(float(torch.stack(drawn).double().mean()) - alpha) <= 5 * math.sqrt(
        alpha * (1 - alpha) / MANY
    )


def test_sizes_that_no_byte_fills_are_drawn_to_the_end():
    """Bytes come eight at a time; a size that is no multiple leaves some over."""
    for rest in range(8):
        drawn = bernoulli(0.5, torch.empty((1 << 15) + rest), "element", None)
        assert drawn.shape == ((1 << 15) + rest,)
        assert abs(float(drawn.double().mean()) - 0.5) < 5 * 0.5 / math.sqrt(1 << 15)
    ends = torch.stack(
        [bernoulli(1 / 256, torch.empty((1 << 15) + 3), "element", None)[-3:] for _ in range(400)]
    )
    assert ends.sum() < 25  # 4.7 expected: the last ones are no ties


def test_a_draw_per_sample_has_the_shape_of_the_samples():
    assert bernoulli(0.5, torch.empty(6, 3, 2), "sample", None).shape == (6,)
    assert bernoulli(0.5, torch.empty(6, 3, 2), "element", None).shape == (6, 3, 2)
    assert bernoulli(0.5, torch.empty(()), "sample", None).shape == ()
    levels = torch.tensor([0.0, 1.0, 0.0])
    assert bernoulli(levels, torch.empty(3, 2), "sample", None).tolist() == [False, True, False]
    rows = bernoulli(levels, torch.empty(3, 1 << 14, 2), "element", None)
    assert rows.flatten(1).all(1).tolist() == [False, True, False]
    assert rows.flatten(1).any(1).tolist() == [False, True, False]


def test_levels_of_samples_have_each_their_probability():
    levels = torch.tensor([0.1, 0.4, 0.8])
    drawn = bernoulli(levels, torch.empty(3, 1 << 18), "element", None)
    for row, want in zip(drawn, levels.tolist(), strict=True):
        bound = 5 * math.sqrt(want * (1 - want) / (1 << 18))
        assert abs(float(row.double().mean()) - want) < bound


@pytest.mark.parametrize("bound", [0.05, 0.25, 1.0])
def test_noise_has_the_moments_of_a_truncated_normal(bound):
    noise = truncated_normal(torch.empty(400_000), bound, None).double()
    assert float(noise.abs().max()) <= bound * (1 + 1e-6)
    assert float(noise.abs().max()) > 0.999 * bound
    grid = np.linspace(-bound, bound, 20_001)
    density = np.exp(-(grid**2) / 2)
    variance = (grid**2 * density).sum() / density.sum()
    assert float(noise.var()) == pytest.approx(variance, rel=0.01)
    assert abs(float(noise.mean())) < 5 * math.sqrt(variance / 400_000)


def test_a_generator_decides_the_noise():
    one, two, three = (truncated_normal(torch.empty(9), 0.25, seeded(s)) for s in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, three)


def test_levels_that_are_materialized_are_the_same():
    for levels in (torch.rand(5), torch.rand(4, 1), torch.rand(3) < 0.5, torch.tensor(0.3)):
        again = materialized(levels)
        assert again.dtype == torch.float32
        assert torch.equal(again, levels.float())


def test_what_has_no_values_is_drawn_without_any():
    assert bernoulli(0.3, torch.empty(MANY, device="meta"), "element", None).is_meta
    with FakeTensorMode():
        drawn = bernoulli(0.3, torch.empty(MANY, 2), "sample", None)
        assert (drawn.shape, drawn.dtype) == ((MANY,), torch.bool)


def test_draws_by_bytes_are_independent_and_repeat_with_the_generator():
    states = [seeded(3) for _ in range(2)]
    one, two = (bernoulli(0.3, torch.empty(1 << 18), "element", state) for state in states)
    assert torch.equal(one, two)
    assert not torch.equal(one, bernoulli(0.3, torch.empty(1 << 18), "element", states[0]))
    centred = one.double() - 0.3
    for lag in (1, 2, 3, 4, 7, 8, 16):
        assert abs(float((centred[lag:] * centred[:-lag]).mean())) < 5 * 0.21 / math.sqrt(1 << 18)


@pytest.mark.parametrize("dtype", FLOATS)
def test_draws_of_few_elements_are_of_float32_whatever_the_input(dtype):
    """A bfloat16 uniform has 256 values: 0.001 would be drawn as 1/256."""
    x = torch.empty(4000, dtype=dtype)
    drawn = torch.stack([bernoulli(0.001, x, "element", None) for _ in range(100)])
    rate = float(drawn.double().mean())
    assert rate == pytest.approx(0.001, abs=5 * math.sqrt(0.001 / drawn.numel()))
    levels = torch.full((4000,), 0.001, dtype=dtype)
    drawn = torch.stack([bernoulli(levels, x, "sample", None) for _ in range(100)])
    rate = float(drawn.double().mean())
    assert rate == pytest.approx(0.001, abs=5 * math.sqrt(0.001 / drawn.numel()))


def test_draws_of_many_elements_are_of_float32_where_a_byte_ties():
    x = torch.empty(1 << 24, dtype=torch.bfloat16)
    alpha = 1.1 / 256**2  # just above one of 256 values of what follows the first byte
    rate = float(bernoulli(alpha, x, "element", None).double().mean())
    assert rate == pytest.approx(alpha, abs=5 * math.sqrt(alpha / (1 << 24)))


@pytest.mark.parametrize("dtype", FLOATS)
def test_noise_is_of_float32_whatever_the_input(dtype):
    noise = truncated_normal(torch.empty(3000, dtype=dtype), 0.25, None)
    assert noise.dtype == torch.float32
    assert len(noise.unique()) > 2900
