"""What a user writes against the public names; pyright reads it, nothing runs it."""

import copy

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import sc_bce
from sc_bce import (
    AdaptivePerturbation,
    CalibrationHistogram,
    ImageHistograms,
    IndexedDataset,
    IsotonicCalibration,
    SCBCEWithLogitsLoss,
    TemperatureScaling,
    perturb_target,
    sc_bce_with_logits,
)
from sc_bce.integrations.lightning import AdaptivePerturbationCallback
from sc_bce.plot import reliability_diagram

logits = torch.randn(4, 3, requires_grad=True)
mask = torch.rand(4, 3) > 0.5
index = torch.arange(4)
rate = torch.tensor([0.1, 0.2, 0.3])

# The functional.
loss: Tensor = sc_bce_with_logits(logits, mask, 0.1)
loss = sc_bce_with_logits(
    logits, mask, torch.rand(4), 1.0, prior=rate, weight=rate, pos_weight=rate, ignore_index=255,
    reduction="none",
)  # fmt: skip
soft: Tensor = perturb_target(mask, 0.1, prior=0.02, dtype=torch.float32)

# The fixed loss, in torch's place and by its named settings.
criterion: nn.Module = SCBCEWithLogitsLoss()
criterion = SCBCEWithLogitsLoss(rate, reduction="sum", pos_weight=1 / rate, alpha=0.1, prior=rate)
losses = [
    SCBCEWithLogitsLoss.label_smoothing(0.1, ignore_index=255),
    SCBCEWithLogitsLoss.disturb_label(0.1, sampling="element"),
    SCBCEWithLogitsLoss.hard_inversion(0.1, reduction="mean"),
    SCBCEWithLogitsLoss.soft_inversion(0.1, generator=torch.Generator()),
    SCBCEWithLogitsLoss.moderation(0.2, prior=0.02),
    SCBCEWithLogitsLoss.dynamic_moderation(0.1, pos_weight=rate),
]
for one in losses:
    one(logits, mask).backward()
    total: Tensor = one.forward(logits, mask)
    up, down = one.flip_rates
    print(float(up + down), one.alpha, one.beta, one.to("cpu").eval())


class Mine(SCBCEWithLogitsLoss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return super().forward(input, target).mean()


mine: Mine = copy.deepcopy(Mine(alpha=1.0, beta=0.1)).to(torch.float64)
same_class: Mine = Mine.moderation(0.1)

# The adaptive loss in a training.
model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
data = IndexedDataset(TensorDataset(torch.randn(40, 8), torch.rand(40, 3) > 0.5))
adaptive = AdaptivePerturbation(len(data), ignore_index=255, pos_weight=rate)
adaptive = AdaptivePerturbation(
    num_samples=40, level=0.1, focus=0.0, beta=1.0, prior="level_weighted", warmup=2,
    sampling="element", num_labels=3, weight=rate, reduction="sum",
)  # fmt: skip
published: AdaptivePerturbation = AdaptivePerturbation.published(
    40, objective="max_entropy", lr=0.01, penalty=100.0, beta=1.0, prior=0.5
)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
for images, labels, rows in DataLoader(data, batch_size=8, shuffle=True):
    optimizer.zero_grad()
    adaptive(model(images), labels, rows).backward()
    step_loss: Tensor = adaptive.forward(model(images), labels, rows, update=False)
    adaptive.update(model(images), labels, rows)
    optimizer.step()
histogram = CalibrationHistogram(num_labels=3)
with torch.no_grad():
    histogram.update(model(torch.randn(40, 8)), torch.rand(40, 3) > 0.5, ignore_index=255)
adaptive.step(histogram, group=None)
published(model(images), labels, torch.arange(len(images))).backward()
published.step(0.9)
adaptive.resize(50)
adaptive.reset_parameters()
up, down = adaptive.flip_rates
print(adaptive.alpha.mean().item(), float(up.sum()), adaptive.beta, adaptive.prior)
torch.save({"criterion": adaptive.state_dict(), "model": model.state_dict()}, "last.pt")
adaptive.load_state_dict(torch.load("last.pt", weights_only=True)["criterion"])
shared = AdaptivePerturbation(None)
shared(logits, mask).backward()

# Measures.
whole, coarse = CalibrationHistogram(), CalibrationHistogram(num_cells=1000)
coarse.update(np.full((4, 3), 0.5), np.ones((4, 3)), from_logits=False)
whole.update(torch.randn(40), torch.rand(40) > 0.5, weight=torch.rand(40), ignore_index=None)
whole.update(torch.randint(256, (40,), dtype=torch.uint8), torch.rand(40) > 0.5)
print(f"ECE {whole.ece():.3f}", histogram.ece(num_bins=15).tolist())
for value in (whole.accuracy(), whole.confidence(), whole.nll(), whole.brier(), whole.slope()):
    print(float(value))
print(f"MCE {whole.mce(kind='positive_class'):.3f}, over-confidence {whole.oe(15):.3f}")
bins = whole.reliability(10, equal_mass=True)
bins = whole.reliability(edges=[0.5, 0.8, 1.0])
parts = whole.decomposition()
print(bins, parts, whole.summary(), whole.to_dict(), histogram.pooled().label(0).intercept())
merged: CalibrationHistogram = copy.deepcopy(histogram).all_reduce() or histogram
pictures = ImageHistograms()
pictures.update(torch.randn(4, 1, 8, 8), torch.rand(4, 1, 8, 8) > 0.5)
interval = pictures.interval("nll", resamples=100)
table: dict[str, Tensor] = pictures.per_image()
print(interval, pictures.histogram().ece())

# Repairs.
for repair in (TemperatureScaling(bias=True), TemperatureScaling(None), IsotonicCalibration()):
    calibrated: Tensor = repair.fit(whole)(logits)
    calibrated = repair.fit(logits.sigmoid(), mask, from_logits=False).forward(logits.sigmoid())
    calibrated = repair.fit(logits, mask, ignore_index=255).forward(logits)
    network = nn.Sequential(model, repair)
IsotonicCalibration().fit(np.linspace(-1, 1, 9), np.arange(9) % 3 > 0)
scaling = TemperatureScaling((0.05, 0.1), num_labels=3).fit(histogram)
print(scaling.temperature.tolist(), scaling.flip_rates.tolist(), scaling.nll)

figure = reliability_diagram({"validation": whole, "test": whole}, num_bins=10)
figure.savefig("reliability.png")
figure = sc_bce.plot.reliability_diagram(whole)
callback = AdaptivePerturbationCallback("criterion")
