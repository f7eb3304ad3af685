"""The measures of a histogram as text: a table, and a line of advice."""

from __future__ import annotations

import math
from collections.abc import Mapping

_ROWS = {
    "count": "elements",
    "sure": "exactly 0 or 1",
    "sure_wrong": "  of these wrong",
    "accuracy": "accuracy",
    "confidence": "mean confidence",
    "base_rate": "base rate",
    "mean_probability": "mean probability",
    "slope": "slope",
    "intercept": "intercept",
    "ece": "ECE, top label",
    "ece_positive_class": "ECE, positive class",
    "nll": "NLL",
    "nll_miscalibration": "  miscalibration",
    "nll_discrimination": "- discrimination",
    "nll_uncertainty": "+ uncertainty",
    "brier": "Brier score",
    "brier_miscalibration": "  miscalibration",
    "brier_discrimination": "- discrimination",
    "brier_uncertainty": "+ uncertainty",
}
_COUNTS = ("count", "sure", "sure_wrong")


def summary(values: Mapping[str, list[float]], named: bool) -> str:
    """The table, with a column for each label, and what helps; ``named`` shows the labels."""
    labels = range(len(values["count"]))
    lines = [" " * 20 + "".join(f"{f'label {i}':>12}" for i in labels)] * named
    sure = any(values["sure"])
    for key, title in _ROWS.items():
        if sure or key not in _COUNTS[1:]:
            shown = ".10g" if key in _COUNTS else ".4f"
            lines.append(f"{title:<20}" + "".join(f"{one:>12{shown}}" for one in values[key]))
    who: dict[str, list[str]] = {}
    for label in labels:
        own = {name: column[label] for name, column in values.items()}
        who.setdefault(advice(own), []).append(str(label))
    if len(who) > 1:
        who = {f"label {', '.join(some)}: {text}": some for text, some in who.items()}
    return "\n".join((*lines, *who))


def advice(values: Mapping[str, float]) -> str:
    """What helps: a repair, perhaps label smoothing, or nothing."""
    slope, nll, elements = values["slope"], values["nll"], values["count"]
    if slope != slope:
        return "No advice yet: measure data with both classes and more than one logit."
    if slope == math.inf:
        return "A threshold separates the classes, up to ties: the slope is infinite. Measure more."
    if slope <= 0:
        return "The logits rank the labels backwards (slope below 0): check the data first."
    # What luck gives, on data that are calibrated: about one nat for each block of the curve, and
    # a base rate within two standard errors.
    gain = (values["nll_miscalibration"] - values["blocks"] / elements) / nll
    rate, error = values["base_rate"], math.sqrt(values["brier"] / elements)
    shift = abs(values["mean_probability"] - rate) > max(0.05 * min(rate, 1 - rate), 2 * error)
    if slope < 0.9:
        text = "Over-confident (slope below 1): repair it or stop earlier; smoothing may help too."
    elif slope > 1.1:
        text = "Not confident enough (slope above 1): repair it; label smoothing would hurt."
    elif gain > 0.01 or shift:
        text = "The slope is right, the curve is not: repair it; label smoothing would not help."
    else:
        text = "Well calibrated: nothing to repair."
    if shift:
        text += " The mean probability is not the base rate, which takes a repair with a bias."
    if nll == math.inf:
        text += (
            " A probability of exactly 0 or 1 is wrong, so the NLL is infinite: measure logits, or"
            " probabilities that were not rounded."
        )
    return text
