"""What is measured on the answers of one run, and kept in its JSON."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sc_bce import CalibrationHistogram

Array = NDArray[Any]
Answers = dict[str, tuple[Array, Array]]  # per part, the logits and the masks, (N, 1, H, W) each
Measures = dict[str, dict[str, float]]
Table = dict[str, list[float]]


def histogram(logits: Tensor, target: Tensor) -> CalibrationHistogram:
    seen = CalibrationHistogram()
    seen.update(logits, target)
    return seen


def measure(answers: Answers) -> tuple[Measures, dict[str, Table]]:
    """Every measure, and the table of the reliability diagram, for each part."""
    measures, tables = {}, {}
    for part, (logits, masks) in answers.items():
        seen = histogram(torch.from_numpy(logits), torch.from_numpy(masks))
        measures[part] = _measure_part(seen) | {"f": _f_measure(logits >= 0, masks)}
        tables[part] = _reliability(seen)
    measures["shift"] = _separation(answers["test"][0], answers["ood"][0])
    return measures, tables


def _measure_part(seen: CalibrationHistogram) -> dict[str, float]:
    values = {
        "accuracy": seen.accuracy(),
        "nll": seen.nll(),
        "brier": seen.brier(),
        "ece": seen.ece(num_bins=10),
        "adaptive_ece": seen.adaptive_ece(),
        "debiased_ece": seen.debiased_ece(),
        "oe": seen.oe(),
        "confidence": seen.confidence(),
    }
    return {name: float(v) for name, v in values.items()}


def _reliability(seen: CalibrationHistogram) -> Table:
    """Pixels per bin with the sums of confidence and of right answers: the seeds can be added."""
    table = seen.reliability(num_bins=10)
    sums = {"confidence": table.confidence * table.count, "right": table.accuracy * table.count}
    return {"count": table.count.tolist()} | {k: v.nan_to_num(0).tolist() for k, v in sums.items()}


def _f_measure(found: Array, masks: Array, beta2: float = 0.3) -> float:
    """F-measure of all pixels together; beta squared is 0.3, as usual for saliency."""
    hits = float((found * masks).sum())
    return (1 + beta2) * hits / max(float(found.sum()) + beta2 * float(masks.sum()), 1.0)


def _separation(inside: Array, outside: Array) -> dict[str, float]:
    """Area under the ROC curve of confidence as a sign of being in distribution.

    Once with every pixel as a case, once with every image as a case (its mean confidence). The
    first is what the tables show: images differ in how many edges they have, pixels are alike.
    """
    sure = [1 / (1 + np.exp(-np.abs(logits.astype(np.float64)))) for logits in (inside, outside)]
    return {
        "auroc_pixel": auroc(*(s.ravel() for s in sure)),
        "auroc_image": auroc(*(s.reshape(len(s), -1).mean(1) for s in sure)),
    }


def auroc(high: Array, low: Array) -> float:
    """Chance that a case of the first kind has the larger value; ties count half."""
    from sklearn.metrics import roc_auc_score

    kinds = np.repeat([1, 0], [len(high), len(low)])
    return float(roc_auc_score(kinds, np.concatenate([high, low])))
