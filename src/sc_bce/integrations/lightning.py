"""The callback for Lightning. Needs `pip install lightning`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.utils.data import DistributedSampler

from .._errors import refuse
from ..losses import AdaptivePerturbation, SCBCEWithLogitsLoss
from ..measure import CalibrationHistogram

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.utilities import CombinedLoader
except ImportError as error:
    raise ImportError("AdaptivePerturbationCallback needs: pip install lightning") from error

_LOSSES = (AdaptivePerturbation, SCBCEWithLogitsLoss)

__all__ = ["AdaptivePerturbationCallback"]


class AdaptivePerturbationCallback(Callback):
    """Lightning callback that measures calibration in each validation and steps the criterion.

    ``validation_step`` returns a mapping with ``"logits"`` and ``"target"``. At the end of each
    validation of ``fit`` the callback calls ``step`` of an :class:`AdaptivePerturbation` with the
    histogram over all processes and logs ``val_ece``, ``val_oe`` and ``alpha_mean``. With an
    :class:`SCBCEWithLogitsLoss`, which has no levels, it only logs the first two.
    ``Trainer.validate`` logs without a step; the sanity check before training does neither.

    Args:
        criterion: name of the criterion in the LightningModule, with dots for a nested one.
            Default: ``"criterion"``.

    Attributes:
        histogram: :class:`CalibrationHistogram` of the last validation, over all processes.

    Raises:
        ValueError: in use, if there is no loss of this package under that name, or
            ``validation_step`` returns something else.
        ImportError: at import, if lightning is not installed.

    Note:
        Elements with the criterion's ``ignore_index`` are left out. To leave out a second
        validation loader (out of distribution, for example), return None from
        ``validation_step`` for its batches. Each validation is a step: if there is not exactly
        one per epoch, the criterion's ``warmup`` counts validations. In several processes
        Lightning's sampler repeats samples until all processes have equally many. ``fit`` leaves
        these out, as long as dimension 0 of what ``validation_step`` returns counts samples.
        ``Trainer.validate`` counts them twice; Lightning recommends one device for it.

        The criterion is a part of the LightningModule, so that its checkpoint holds the levels.
        A checkpoint that is written after a validation, as ModelCheckpoint does, restores all
        processes. One from within an epoch holds only the levels of the process that wrote it.

    Example:
        >>> from sc_bce.integrations.lightning import AdaptivePerturbationCallback
        >>> callback = AdaptivePerturbationCallback(criterion="loss")
        >>> callback.histogram
        CalibrationHistogram(num_cells=10000, count=0)
    """

    def __init__(self, criterion: str = "criterion") -> None:
        self.criterion = criterion
        self.histogram = CalibrationHistogram()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._find(pl_module)  # fail before the first epoch rather than after it

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.histogram = CalibrationHistogram()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if outputs is None and dataloader_idx > 0:  # a second loader, left out on request
            return
        logits, target = _logits_and_target(outputs)
        if trainer.state.fn == "fit":
            loaders = CombinedLoader(trainer.val_dataloaders, "sequential").flattened
            once = len(logits) - _repeated(loaders[dataloader_idx], batch_idx, len(logits))
            logits, target = logits[:once], target[:once]
        self.histogram.update(logits, target, ignore_index=self._find(pl_module).ignore_index)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        histogram, criterion = self.histogram.all_reduce(), self._find(pl_module)
        if trainer.sanity_checking:
            return
        # Step here and not later: a checkpoint may be written right after the validation.
        measures = {"val_ece": histogram.ece(), "val_oe": histogram.oe()}
        if isinstance(criterion, AdaptivePerturbation):
            if trainer.state.fn == "fit":
                criterion.step(histogram)
            measures["alpha_mean"] = criterion.alpha.mean()
        # The processes agree already, but without sync_dist Lightning warns that they may not.
        pl_module.log_dict({k: float(v) for k, v in measures.items()}, sync_dist=True)

    def _find(self, pl_module: LightningModule) -> AdaptivePerturbation | SCBCEWithLogitsLoss:
        """The criterion of that name, dots allowed."""
        modules = dict(pl_module.named_modules(remove_duplicate=False))
        found = modules.get(self.criterion)
        if not isinstance(found, _LOSSES):
            others = [repr(key) for key, module in modules.items() if isinstance(module, _LOSSES)]
            got = "of which there is none" if found is None else f"a {type(found).__name__}"
            refuse(
                "criterion",
                "be the name of an AdaptivePerturbation or SCBCEWithLogitsLoss in the "
                f"{type(pl_module).__name__}",
                f"{self.criterion!r}, {got}",
                f"choose {', '.join(others)}" if others else "assign one in its __init__",
            )
        return found


def _repeated(loader: Any, batch_idx: int, rows: int) -> int:
    """How many rows at the end of a batch are there to give all processes equally many."""
    sampler, size = getattr(loader, "sampler", None), getattr(loader, "batch_size", None)
    if not isinstance(sampler, DistributedSampler) or size is None:
        return 0
    first: int = batch_idx * size
    if rows != min(size, sampler.num_samples - first):  # not one row per sample
        return 0
    samples = len(sampler.dataset)  # type: ignore[arg-type]  # map-style: it has a length
    own = len(range(sampler.rank, samples, sampler.num_replicas))
    return min(rows, max(0, first + rows - own))


def _logits_and_target(outputs: object) -> tuple[Any, Any]:
    """Check what a validation step returned."""
    if not isinstance(outputs, Mapping) or not {"logits", "target"} <= set(outputs):
        held = f" with {sorted(map(str, outputs))}" if isinstance(outputs, Mapping) else ""
        raise ValueError(
            "Expected `validation_step` to return a mapping with 'logits' and 'target', but got "
            f"{'None' if outputs is None else type(outputs).__name__ + held}; "
            'return {"logits": logits, "target": target}'
        )
    return outputs["logits"], outputs["target"]
