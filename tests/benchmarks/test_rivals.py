"""The rivals of the study against their formulas, written out in NumPy."""

import numpy as np
import pytest
import torch
from scipy.special import expit, xlogy

from benchmarks.study import rivals

SHAPE = (3, 1, 5, 6)


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    return rng.normal(0, 2, SHAPE), (rng.random(SHAPE) < 0.3).astype(float)


def value(loss, z, y):
    return float(loss(torch.tensor(z), torch.tensor(y)))


def true_class(z, y):
    p = expit(z)
    return np.where(y == 1, p, 1 - p)


def bce(z, y):
    return -xlogy(y, expit(z)) - xlogy(1 - y, expit(-z))


def test_focal(batch):
    p = true_class(*batch)
    assert value(rivals.Focal(2), *batch) == pytest.approx(-np.mean((1 - p) ** 2 * np.log(p)))
    assert value(rivals.Focal(0), *batch) == pytest.approx(bce(*batch).mean())


def test_flsd_53(batch):
    p = true_class(*batch)
    want = -np.mean((1 - p) ** np.where(p < 0.2, 5, 3) * np.log(p))
    assert value(rivals.SampleFocal(), *batch) == pytest.approx(want)


def test_brier(batch):
    z, y = batch
    assert value(rivals.Brier(), z, y) == pytest.approx(np.mean((expit(z) - y) ** 2))


def test_adafocal_weighs_each_bin(batch):
    loss = rivals.AdaFocal(3)
    loss.edges, loss.gamma = torch.tensor([0.3, 0.8]), torch.tensor([2.0, -1.5, 0.5])
    p = true_class(*batch)
    weight = np.where(p <= 0.3, (1 - p) ** 2, np.where(p <= 0.8, (1 + p) ** 1.5, (1 - p) ** 0.5))
    assert value(loss, *batch) == pytest.approx(-np.mean(weight * np.log(p)), rel=1e-6)


def test_adafocal_moves_each_gamma_by_its_own_error(batch):
    z, y = batch
    loss = rivals.AdaFocal(3)
    loss.gamma = torch.tensor([0.21, 1.0, -0.21])
    order = np.argsort(np.abs(z), axis=None)
    sure = expit(np.abs(z)).ravel()[order].reshape(3, -1)
    right = ((z >= 0) == (y == 1)).ravel()[order].reshape(3, -1)
    error = sure.mean(1) - right.mean(1)
    want = np.array([0.21, 1.0, -0.21]) * np.exp(error * np.array([1, 1, -1]))
    want = np.where(np.abs(want) < 0.2, -np.sign(want) * 0.2, want)
    loss.see(torch.tensor(z), torch.tensor(y))
    np.testing.assert_allclose(loss.gamma, want, rtol=1e-5)
    np.testing.assert_allclose(loss.edges, sure[1:, 0], rtol=1e-6)


def test_mmce(batch):
    z, y = batch
    sure = expit(np.abs(z)).ravel()
    gap = ((z >= 0) == (y == 1)).ravel() - sure
    total = 0.0
    for a, r in zip(gap, sure, strict=True):
        for b, s in zip(gap, sure, strict=True):
            total += a * b * np.exp(-abs(r - s) / 0.4)
    want = bce(z, y).mean() + 4 * total / z.size**2
    generator = torch.Generator().manual_seed(0)
    assert value(rivals.MMCE(4, generator), z, y) == pytest.approx(want, rel=1e-5)


def test_mbls(batch):
    z, y = batch
    want = bce(z, y).mean() + 0.05 * np.mean(np.maximum(np.abs(z) - 1.5, 0))
    assert value(rivals.Margin(1.5), z, y) == pytest.approx(want)


def window(y, i, j):
    """The 3 x 3 labels around an element, the border repeated."""
    rows = np.clip(np.arange(i - 1, i + 2), 0, y.shape[-2] - 1)
    columns = np.clip(np.arange(j - 1, j + 2), 0, y.shape[-1] - 1)
    return y[..., rows[:, None], columns]


def test_nacl(batch):
    z, y = batch
    share = np.zeros(SHAPE)
    for i, j in np.ndindex(SHAPE[2:]):
        share[..., i, j] = window(y, i, j).mean((-1, -2))
    want = bce(z, y).mean() + 0.3 * np.abs(share - z).mean()
    assert value(rivals.Neighbours(0.3), z, y) == pytest.approx(want)


def test_svls(batch):
    z, y = batch
    weight = np.array([[np.exp(-(i * i + j * j) / 2) for j in (-1, 0, 1)] for i in (-1, 0, 1)])
    weight[1, 1] = 0
    weight /= weight.sum()
    q = np.zeros(SHAPE)
    for i, j in np.ndindex(SHAPE[2:]):
        q[..., i, j] = y[..., i, j] / 2 + (weight * window(y, i, j)).sum((-1, -2)) / 2
    z, y = torch.tensor(z).float(), torch.tensor(y).float()
    assert float(rivals.SpatiallyVarying()(z, y)) == pytest.approx(
        bce(z.numpy(), q).mean(), rel=1e-5
    )


def test_hl1_ace(batch):
    z, y = batch
    errors = []
    for p, label in zip(expit(z).reshape(3, -1), y.reshape(3, -1), strict=True):
        place = np.minimum((p * 20).astype(int), 19)
        gaps = [abs(p[place == b].mean() - label[place == b].mean()) for b in set(place)]
        errors.append(np.mean(gaps))
    want = (bce(z, y).mean() + np.mean(errors)) / 2
    assert value(rivals.HardACE(), z, y) == pytest.approx(want)


def test_the_confidence_penalty(batch):
    z, y = batch
    p = expit(z)
    entropy = -xlogy(p, p) - xlogy(1 - p, 1 - p)
    want = np.mean(bce(z, y) - 0.3 * entropy)
    assert value(rivals.ConfidencePenalty(0.3), z, y) == pytest.approx(want)


def test_dice_with_and_without_moderation(batch):
    z, y = batch
    p = expit(z).reshape(3, -1)

    def want(q):
        flat = q.reshape(3, -1)
        dice = (2 * (p * flat).sum(1) + 1) / (p.sum(1) + flat.sum(1) + 1)
        return bce(z, q).mean() + np.mean(1 - dice)

    assert value(rivals.DiceBCE(), z, y) == pytest.approx(want(y))
    drawn = torch.rand(3, generator=torch.Generator().manual_seed(5)).numpy() < 0.5
    assert 0 < drawn.sum() < 3
    q = np.where(drawn[:, None, None, None], 0.2, y)
    loss = rivals.DiceBCE(0.5, 0.2, torch.Generator().manual_seed(5))
    assert value(loss, z, y) == pytest.approx(want(q), rel=1e-6)


def test_moderation_towards_the_own_share(batch):
    z, y = batch
    drawn = torch.rand(3, generator=torch.Generator().manual_seed(5)).numpy() < 0.5
    share = y.mean((1, 2, 3), keepdims=True)
    q = np.where(drawn[:, None, None, None], share, y)
    loss = rivals.OwnShare(0.5, torch.Generator().manual_seed(5))
    assert value(loss, z, y) == pytest.approx(bce(z, q).mean(), rel=1e-6)


def test_mixup_mixes_inputs_and_labels_alike():
    draws = torch.Generator().manual_seed(0)
    x = torch.arange(6.0)[:, None] + 1
    mixed, labels = rivals.mixed(x, x * 2, 0.3, draws)
    torch.testing.assert_close(labels, mixed * 2)
    assert mixed.sum() == pytest.approx(float(x.sum()))


def test_the_shares_of_mixup_are_a_beta_distribution():
    draws = torch.Generator().manual_seed(0)
    x = torch.tensor([[0.0], [1.0]])
    first = [float(rivals.mixed(x, x, 0.3, draws)[0][0]) for _ in range(4000)]
    # 0 where the sample was mixed with itself, in half of the draws; else 1 - L
    moved = np.array([share for share in first if share > 0])
    assert np.mean(moved) == pytest.approx(0.5, abs=0.03)
    assert np.var(moved) == pytest.approx(1 / (4 * 1.6), rel=0.06)
