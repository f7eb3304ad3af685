"""The histogram as a metric: its numbers to the bit, whatever torchmetrics does with it."""

import pickle

import pytest
import torch
from ranks import run
from torchmetrics import MetricCollection
from torchmetrics.classification import BinaryAccuracy, BinaryCalibrationError

from sc_bce import CalibrationHistogram
from sc_bce.integrations.torchmetrics import CalibrationMetric


def batches(seed=0, labels=()):
    generator = torch.Generator().manual_seed(seed)
    for size in (40, 7, 25):
        truth = torch.randn(size, *labels, 6, generator=generator)
        yield 2 * truth, (torch.rand(truth.shape, generator=generator) < truth.sigmoid()).long()


def same(values, histogram):
    wanted = histogram.measures()
    assert list(values) == list(wanted)
    for name, value in values.items():
        assert value.dtype == torch.float64
        torch.testing.assert_close(value, wanted[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("labels", [None, 3])
def test_it_is_the_histogram_to_the_bit(labels):
    metric, histogram = CalibrationMetric(labels), CalibrationHistogram(labels)
    for logits, target in batches(labels=() if labels is None else (labels,)):
        metric.update(logits, target)
        histogram.update(logits, target)
    same(metric.compute(), histogram)
    for name, part in metric.histogram().state_dict().items():
        assert torch.equal(part, histogram.state_dict()[name])
    metric.reset()
    assert all(not part.any() for part in metric.histogram().state_dict().values())


def test_forward_returns_the_batch_and_keeps_the_sum():
    metric, histogram = CalibrationMetric(), CalibrationHistogram()
    for logits, target in batches():
        alone = CalibrationHistogram()
        for one in (alone, histogram):
            one.update(logits, target)
        same(metric(logits, target), alone)
    same(metric.compute(), histogram)


def test_a_collection_calls_each_with_its_own():
    settings = {"from_logits": False, "ignore_index": 255}
    together = MetricCollection(
        {
            "calibration": CalibrationMetric(**settings),
            "coarse": CalibrationMetric(num_cells=100, **settings),
            "accuracy": BinaryAccuracy(ignore_index=255),
            "theirs": BinaryCalibrationError(n_bins=10, ignore_index=255),
        }
    )
    for logits, target in batches():
        target[::5] = 255
        together.update(preds=logits.sigmoid().double(), target=target)
    values = together.compute()
    assert float(values["calibration_accuracy"]) == pytest.approx(float(values["accuracy"]))
    ours = {values[f"{one}_ece_positive_class"].item() for one in ("calibration", "coarse")}
    assert max(ours) - min(ours) < 1e-12
    assert ours.pop() == pytest.approx(float(values["theirs"]), abs=1e-6)


def test_it_is_saved_and_pickled():
    metric, other = CalibrationMetric(), CalibrationMetric()
    for one in (metric, other):
        one.persistent(True)
    metric.update(*next(iter(batches())))
    other.load_state_dict(metric.state_dict())
    same(other.histogram().measures(), metric.histogram())
    same(pickle.loads(pickle.dumps(metric)).compute(), metric.histogram())


def test_logits_that_are_probabilities_are_said_once_they_are_read():
    metric = CalibrationMetric()
    metric.update(torch.rand(200), torch.arange(200) % 2)
    with pytest.warns(UserWarning, match="as if they were probabilities"):
        metric.compute()
    with pytest.raises(ValueError, match="`target` to"):
        metric.update(torch.randn(4), torch.tensor([0, 1, 255, 1]))


def synchronised(rank, world):
    metric = CalibrationMetric()
    for logits, target in batches(rank):
        metric.update(logits, target)
    values = metric.compute()
    return values, float(metric.histogram().measures()["count"])


def test_processes_are_summed_by_torchmetrics():
    histogram = CalibrationHistogram()
    for rank in range(2):
        for logits, target in batches(rank):
            histogram.update(logits, target)
    for values, own in run(2, synchronised):
        assert own == float(histogram.measures()["count"]) / 2
        for name, value in histogram.measures().items():
            torch.testing.assert_close(values[name], value, rtol=1e-12, atol=1e-15)
