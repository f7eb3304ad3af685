"""The Lightning callback, and the page of recipes run as printed: alone and in two processes."""

import dataclasses
import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from types import FunctionType, SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from ranks import connect, leave
from test_docs import ROOT, blocks
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from benchmarks.data.scenes import SmallUNet, digit_scenes, to_tensors
from sc_bce import AdaptivePerturbation, CalibrationHistogram, IndexedDataset, SCBCEWithLogitsLoss

REASON = "pip install sc-bce[test] for the frameworks"
L = pytest.importorskip("lightning", reason=REASON)
for package in ("transformers", "accelerate", "tensorboard"):
    pytest.importorskip(package, reason=REASON)

from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402

from sc_bce.integrations.lightning import AdaptivePerturbationCallback  # noqa: E402

pytestmark = [
    # What the frameworks warn of: their own use of torch, and that our data is small.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*(many workers|logging interval|pin_memory)"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]

TRAIN, VALIDATION = 20, 11  # an odd number: two processes get one sample twice


def data(batch_size=4, loader=DataLoader):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TRAIN + VALIDATION, 4, generator=generator)
    noise = torch.randn(TRAIN + VALIDATION, 1, generator=generator)
    y = (x.sum(1, keepdim=True) + 3 * noise > 0).int()
    train = IndexedDataset(TensorDataset(x[:TRAIN], y[:TRAIN]))
    validation = TensorDataset(x[TRAIN:], y[TRAIN:])
    # Else Lightning puts in one that shuffles.
    sampler = DistributedSampler(train, shuffle=False) if dist.is_initialized() else None
    return loader(train, batch_size, sampler=sampler), DataLoader(validation, batch_size)


class Module(L.LightningModule):
    def __init__(self, published=False, **options):
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Linear(4, 1)
        build = AdaptivePerturbation.published if published else AdaptivePerturbation
        self.criterion = build(TRAIN, **{"warmup": 2} | options)
        self.losses = []
        self.seen = []

    def training_step(self, batch, batch_idx):
        x, y, index = batch
        loss = self.criterion(self.net(x), y, index)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        x, y = batch
        return {"logits": self.net(x), "target": y}

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.3)


def trainer(*callbacks, max_epochs=6, **options):
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False)
    options = {"accelerator": "cpu", "devices": 1, "max_epochs": max_epochs} | quiet | options
    return L.Trainer(callbacks=[AdaptivePerturbationCallback(), *callbacks], **options)


def fit(module, folder=None, path=None, loaders=None, saves=None, **options):
    """A run that keeps all its checkpoints in the folder, made as ``saves`` says."""
    checkpoints = (
        [ModelCheckpoint(folder, "{step}", save_top_k=-1, **saves or {})] if folder else []
    )
    run = trainer(*checkpoints, enable_checkpointing=bool(folder), **options)
    run.fit(module, *(loaders or data()), ckpt_path=path)


def same(one, other):
    assert list(one) == list(other)
    for name in one:
        assert torch.equal(one[name], other[name]), name


class Watch(L.Callback):
    """After the callback: what it measured, told and logged in each validation."""

    def __init__(self):
        self.rows = []

    def on_validation_end(self, trainer, module):
        histogram = trainer.callbacks[0].histogram
        logged = {k: v.item() for k, v in trainer.callback_metrics.items()}
        state = module.criterion.state_dict()
        told = int(state["steps"]), state["accuracy"].item() if "accuracy" in state else None
        self.rows.append((trainer.sanity_checking, told, logged, histogram))


def test_each_validation_of_a_fit_is_measured_told_and_logged():
    watch, module = Watch(), Module(published=True)
    loaders = data()
    trainer(watch, max_epochs=3, enable_checkpointing=False).fit(module, *loaders)
    (sanity, told, logged, histogram), *epochs = watch.rows
    assert sanity
    assert told == (0, 0.0)
    assert logged == {}
    assert histogram.reliability(1).count.item() == 2 * 4  # batches of the sanity check
    for epoch, (sanity, told, logged, histogram) in enumerate(epochs):
        assert not sanity
        assert told == (epoch + 1, pytest.approx(histogram.accuracy().item()))
        assert histogram.reliability(1).count.item() == VALIDATION
        assert logged["val_ece"] == pytest.approx(histogram.ece().item())
        assert logged["val_oe"] == pytest.approx(histogram.oe().item())
    assert len(epochs) == 3
    want = CalibrationHistogram()
    x, y = loaders[1].dataset.tensors
    want.update(module.net(x), y)
    # All at once or batch by batch: the same but for rounding.
    torch.testing.assert_close(want.state_dict(), histogram.state_dict(), rtol=1e-6, atol=0)
    # Of the last of three epochs, the one after the warm-up.
    assert logged["alpha_mean"] == pytest.approx(module.criterion.alpha.mean().item())
    assert logged["alpha_mean"] > 0


def test_the_default_rule_is_told_the_slope():
    watch, module = Watch(), Module(warmup=1)
    trainer(watch, max_epochs=2, enable_checkpointing=False).fit(module, *data())
    (*_, (_, _, first, _), (_, (steps, _), second, histogram)) = watch.rows
    assert steps == 2
    assert first["alpha_mean"] > 0
    # 0.1 / beta times what the slope lacks; capped rows take less.
    move = 0.1 * (1 - min(max(histogram.slope().item(), 0.0), 2.0))
    assert second["alpha_mean"] - first["alpha_mean"] == pytest.approx(move, abs=0.02)
    assert second["alpha_mean"] == pytest.approx(module.criterion.alpha.mean().item())


def test_a_fixed_loss_is_measured_and_steps_nothing():
    class Fixed(Module):
        def __init__(self):
            super().__init__()
            self.criterion = SCBCEWithLogitsLoss.label_smoothing(0.1)

        def training_step(self, batch, batch_idx):
            return self.criterion(self.net(batch[0]), batch[1])

    run = trainer(max_epochs=1, enable_checkpointing=False)
    run.fit(Fixed(), *data())
    assert set(run.callback_metrics) == {"val_ece", "val_oe"}
    want = run.callbacks[0].histogram.ece().item()
    assert run.callback_metrics["val_ece"].item() == pytest.approx(want)


def test_validate_alone_measures_and_tells_nothing():
    module, run = Module(), trainer()
    (logged,) = run.validate(module, data()[1], verbose=False)
    assert set(logged) == {"val_ece", "val_oe", "alpha_mean"}
    assert logged["val_ece"] == pytest.approx(run.callbacks[0].histogram.ece().item())
    assert module.criterion.state_dict()["steps"] == 0


def test_void_elements_and_a_second_loader_are_left_out():
    class Void(Module):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            if dataloader_idx == 0:
                outputs = super().validation_step(batch, batch_idx)
                outputs["target"][0] = 255
                return outputs
            return None

    run, (_, validation) = trainer(), data()
    run.validate(Void(ignore_index=255), [validation, data()[1]], verbose=False)
    assert run.callbacks[0].histogram.reliability(1).count.item() == VALIDATION - 3


class Nested(Module):
    def __init__(self, criterion):
        super().__init__()
        self.criterion = criterion
        self.losses = nn.ModuleDict({"main": AdaptivePerturbation(TRAIN, ignore_index=1)})


@pytest.mark.parametrize(
    ("module", "name", "message"),
    [
        (
            lambda: Nested(nn.BCEWithLogitsLoss()), "criterion",
            "name of an AdaptivePerturbation or SCBCEWithLogitsLoss in the Nested, but got "
            "'criterion', a BCEWithLogitsLoss; choose 'losses.main'",
        ),
        (lambda: Nested(None), "loss", "got 'loss', of which there is none; choose 'losses.main'"),
        (
            lambda: L.LightningModule(), "criterion",
            "in the LightningModule, but got 'criterion', of which there is none; assign one in",
        ),
    ],
)  # fmt: skip
def test_a_criterion_that_is_not_there(module, name, message):
    callback = AdaptivePerturbationCallback(name)
    with pytest.raises(ValueError, match=f"^Expected argument `criterion` to be the.*{message}"):
        callback.on_fit_start(None, module())


def test_a_criterion_that_lies_deeper():
    module = Nested(nn.BCEWithLogitsLoss())
    callback, (_, validation) = AdaptivePerturbationCallback("losses.main"), data()
    run = trainer()
    run.callbacks[0] = callback
    run.validate(module, validation, verbose=False)
    negatives = (validation.dataset.tensors[1] == 0).sum().item()
    assert callback.histogram.reliability(1).count.item() == negatives  # as it ignores 1
    assert 0 < negatives < VALIDATION


@pytest.mark.parametrize(
    ("outputs", "got"),
    [
        (None, "None"),
        (torch.tensor(0.5), "Tensor"),
        ({"loss": 1, "logits": 2}, r"dict with \['logits', 'loss'\]"),
    ],
)
def test_a_validation_step_that_returns_something_else(outputs, got):
    module = Module()
    module.validation_step = lambda batch, batch_idx: outputs
    message = f"^Expected `validation_step` to return .*, but got {got}; return {{"
    with pytest.raises(ValueError, match=message):
        fit(module)


class Resumable(DataLoader):
    """A loader that goes on where its checkpoint was made."""

    first = done = 0

    def __iter__(self):
        first, self.first = self.first, 0
        for number, batch in enumerate(super().__iter__()):
            if number >= first:
                self.done = number + 1
                yield batch

    def state_dict(self):
        return {"done": self.done}

    def load_state_dict(self, state):
        self.first = state["done"]


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize(
    ("step", "saves"),
    [  # 5 batches per epoch: in the warm-up, at its end, after it
        (5, {"save_on_train_epoch_end": True}),
        (10, {"save_on_train_epoch_end": True}),
        (20, {"save_on_train_epoch_end": True}),
        (10, {"save_on_train_epoch_end": False}),  # at the end of the validation
        (20, {"save_on_train_epoch_end": False}),
        (13, {"every_n_train_steps": 13}),  # in the middle of an epoch
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, step, saves, published):
    runs = []
    for part, seed in (("whole", 5), ("rest", 6)):
        module = Module(published, generator=torch.Generator().manual_seed(seed))
        path = tmp_path / "whole" / f"step={step}.ckpt" if runs else None
        fit(
            module, tmp_path / part, path, data(loader=Resumable if step % 5 else DataLoader), saves
        )
        runs.append(module)
    whole, rest = runs
    assert rest.losses == whole.losses[step:]
    same(rest.state_dict(), whole.state_dict())
    assert whole.criterion.state_dict()["steps"] == 6
    assert (whole.criterion.alpha > 0).any()


def join(rank, world, store):
    connect(rank, world, store)
    here = dict(RANK=rank, LOCAL_RANK=rank, GROUP_RANK=0, WORLD_SIZE=world, LOCAL_WORLD_SIZE=world)
    here |= dict(TORCHELASTIC_RUN_ID="test", MASTER_ADDR="127.0.0.1", MASTER_PORT=0)
    os.environ.update({name: str(value) for name, value in here.items()})
    os.environ["ACCELERATE_USE_CPU"] = "1"


PAGE = ROOT / "docs" / "frameworks.md"


def run_page(folder, lightning=""):
    """What the page's code leaves behind, with further options for its L.Trainer."""
    namespace = {"__name__": "page"}
    os.chdir(folder)
    for number, block in enumerate(blocks(PAGE, "python")):
        code = block.replace("L.Trainer(", f"L.Trainer({lightning}")
        exec(compile(code, f"{PAGE.name}, block {number}", "exec"), namespace)
    return namespace


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    def refuse(*_):
        raise AssertionError("the page's code asks the network")

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("page"))
        patch.setattr(socket.socket, "connect", refuse)
        yield run_page(Path.cwd())


def pair(rank, world, store, out):
    """All that is done in two processes: the imports cost more than the runs."""
    join(rank, world, store)
    warnings.simplefilter("default")
    two = dict(strategy="ddp", devices=world)
    module, watch = Module(sampling="expected"), Watch()
    trainer(watch, enable_checkpointing=False, **two).fit(module, *data(batch_size=2))
    _, _, logged, histogram = watch.rows[-1]
    torch.save((module.state_dict(), logged, histogram.state_dict()), out / f"lightning-{rank}.pt")

    for part, path in (("whole", None), ("rest", out / "whole" / "step=15.ckpt")):
        module = Module(generator=torch.Generator().manual_seed(rank if path is None else 9))
        fit(module, out / part, path, data(batch_size=2), {"save_on_train_epoch_end": False}, **two)
        torch.save((module.state_dict(), module.losses), out / f"{part}-{rank}.pt")

    end = run_page(out, 'accelerator="cpu", strategy="ddp", devices=2, ')
    states = {
        "lightning": end["module"].criterion.state_dict(),
        "trainer": end["trainer"].criterion.state_dict(),
        "accelerate": end["criterion"].state_dict(),
    }
    alone = measured_alone(end)["ece"]
    said = end["trainer"].evaluate()["eval_ece"]
    count = end["histogram"].reliability(1).count.item()
    torch.save((states, alone, said, count), out / f"page-{rank}.pt")
    leave()


def measured_alone(page):
    """The Trainer's model on each validation text once, without the Trainer."""
    model, measure = page["trainer"].model.eval(), page["Calibration"]()
    with torch.no_grad():
        logits = model(input_ids=page["words"][48:]).logits
    return measure(SimpleNamespace(predictions=logits, label_ids=page["labels"][48:]), True)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Both ranks' results, by part."""
    out = tmp_path_factory.mktemp("pair")
    torch.multiprocessing.spawn(pair, (2, out / "store", out), nprocs=2)
    return lambda part: [torch.load(out / f"{part}-{rank}.pt") for rank in range(2)]


def test_two_processes_learn_what_one_does(both):
    watch, alone = Watch(), Module(sampling="expected")
    trainer(watch, enable_checkpointing=False).fit(alone, *data(batch_size=4))
    (state, logged, counts), other = both("lightning")
    for one, two in ((state, other[0]), (counts, other[2])):
        same(one, two)
    assert logged == other[1]
    assert logged == pytest.approx(watch.rows[-1][2], rel=1e-4)
    assert counts["counts"].sum() == VALIDATION
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-6)
    assert alone.criterion.alpha.mean() > 0.01


def test_two_processes_resume_from_one_checkpoint(both):
    for (whole, losses), (rest, later) in zip(both("whole"), both("rest"), strict=True):
        assert later == losses[15:]
        same(rest, whole)


def test_the_page_in_two_processes(both):
    (states, alone, said, count), others = both("page")
    for name, state in states.items():
        assert state["steps"] == 8
        assert state["alpha"].count_nonzero() > 24, name
        same(state, others[0][name])
    assert said == others[2]
    assert said == pytest.approx(alone, rel=1e-5)
    assert count == others[3] == 24 * 64  # each validation sample once


KINDS = ("scalars", "images", "histograms")  # of all of which every event is to be read


def test_the_page_draws_and_logs_each_epoch(page):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for folder, scalars in (
        ("lightning", {"val_ece", "val_oe", "alpha_mean"}),
        ("accelerate", {"ece"}),
    ):
        events = EventAccumulator(f"logs/{folder}", dict.fromkeys(KINDS, 0)).Reload()
        assert scalars <= set(events.Tags()["scalars"])
        drawn = events.Images("reliability"), events.Histograms("alpha")
        assert [[event.step for event in series] for series in drawn] == [list(range(8))] * 2
        # The table's 48 levels, drawn after the step: level .2, moved by at most .1 each time.
        first, last = (drawn[1][epoch].histogram_value for epoch in (0, -1))
        assert first.num == last.num == 48
        assert 0.1 - 1e-6 < first.sum / 48 < 0.3 + 1e-6
        assert last.sum > 0
        assert last.sum != first.sum


def test_the_trainers_measure_is_the_histograms(page):
    criterion = page["trainer"].criterion
    before = criterion.state_dict()["steps"].clone()
    metrics = page["trainer"].evaluate()
    for name, value in measured_alone(page).items():
        assert metrics[f"eval_{name}"] == pytest.approx(value, rel=1e-6), name
    # an evaluation outside a training is no step
    assert criterion.state_dict()["steps"] == before == 8


def adaptive_trainer(page, model=None, criterion=None, **options):
    old = page["trainer"]
    return page["AdaptiveTrainer"](
        model or page["BertForSequenceClassification"](page["config"]),
        dataclasses.replace(page["arguments"], **options),
        train_dataset=old.train_dataset,
        eval_dataset=old.eval_dataset,
        compute_metrics=page["Calibration"](),
        criterion=criterion or AdaptivePerturbation(48),
    )


@pytest.mark.parametrize("epoch", [3, 6])
def test_a_resumed_trainer_is_the_uninterrupted_one(page, epoch):
    whole, rest = page["trainer"], adaptive_trainer(page)
    rest.train(resume_from_checkpoint=f"trainer/checkpoint-{6 * epoch}")
    same(rest.criterion.state_dict(), whole.criterion.state_dict())
    same(rest.model.state_dict(), whole.model.state_dict())
    assert whole.criterion.alpha.count_nonzero() > 24


def test_the_trainer_averages_accumulated_gradients(page):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.words = nn.Embedding(40, 4)

        def forward(self, input_ids, **kwargs):
            return {"logits": self.words(input_ids).mean(1)}

    ends = []
    for size, steps in ((8, 1), (4, 2)):
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        options = sizes | {"num_train_epochs": 1, "optim": "sgd", "max_grad_norm": 0.0}
        run = adaptive_trainer(page, Plain(), output_dir="plain", learning_rate=10.0, **options)
        run.train()
        assert run.state.global_step == 6
        ends.append(run.model.words.weight.detach())
    assert (ends[0] - Plain().words.weight).abs().max() > 0.1
    torch.testing.assert_close(*ends)


def test_the_live_criterion_of_an_averaged_module(page, tmp_path):
    averaging = getattr(L.pytorch.callbacks, "EMAWeightAveraging", None)
    if averaging is None:
        pytest.skip("Lightning 2.6 has it")
    module = Module()
    run = trainer(averaging(decay=0.9), ModelCheckpoint(tmp_path, "last"), max_epochs=3)
    run.fit(module, *data())
    path = tmp_path / "last.ckpt"
    same(page["live_criterion"](path), module.criterion.state_dict())
    assert torch.load(path, weights_only=False)["state_dict"]["criterion.steps"] == 0
    assert module.criterion.state_dict()["steps"] == 3


def test_the_trainer_weights_a_shorter_window_by_its_labels(page, tmp_path):
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.words = nn.Embedding(40, 4)

        def forward(self, input_ids, labels=None, **kwargs):
            return SimpleNamespace(logits=self.words(input_ids).mean(1))

    fixed = SCBCEWithLogitsLoss.label_smoothing(0.1)
    loss = FunctionType(page["compute_loss"].__code__, {"criterion": fixed})
    ends = []
    for size, steps in ((32, 1), (8, 4)):  # 44 texts: windows of 4 and 2 batches, the last of 4
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        arguments = page["TrainingArguments"](
            str(tmp_path), num_train_epochs=1, optim="sgd", max_grad_norm=0.0, learning_rate=10.0,
            save_strategy="no", report_to="none", **sizes,
        )  # fmt: skip
        texts = page["texts"][:44]
        run = page["Trainer"](Words(), arguments, train_dataset=texts, compute_loss_func=loss)
        run.train()
        assert run.state.global_step == 2
        ends.append(run.model.words.weight.detach())
    assert (ends[0] - Words().words.weight).abs().max() > 0.01
    torch.testing.assert_close(*ends)


def test_accelerates_checkpoint_holds_the_criterion(page):
    criterion = page["criterion"]
    saved = {name: value.clone() for name, value in criterion.state_dict().items()}
    assert saved["steps"] == 8
    assert saved["alpha"].count_nonzero() > 24
    criterion.reset_parameters()
    assert criterion.state_dict()["steps"] == 0
    page["accelerator"].load_state("accelerate")
    same(criterion.state_dict(), saved)


def test_without_lightning_the_import_says_what_to_do():
    script = "import sys, sc_bce; sys.modules['lightning'] = None; import sc_bce.integrations\n"
    script += "import sc_bce.integrations.lightning"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    want = "ImportError: AdaptivePerturbationCallback needs: pip install lightning"
    assert done.stderr.splitlines()[-1] == want


class Plain(nn.BCEWithLogitsLoss):
    """The twin of the adaptive loss."""

    def forward(self, input, target, index=None):
        return super().forward(input, target)


def scenes():
    """The built-in scenes at the size of `benchmarks/calibration.py --quick`."""
    made = digit_scenes(32, train=40, val=40, test=120, ood=1)
    return [to_tensors(part) for part in (made.train, made.val, made.test)]


def ece(model, images, masks):
    histogram = CalibrationHistogram()
    with torch.no_grad():
        histogram.update(model.eval()(images), masks)
    return histogram.ece().item()


EPOCHS = 120


def twins(fit):
    """The test ECE of plain BCE and of the default, by seed; all else is equal."""
    rows = []
    for seed in range(3):
        row = []
        for criterion in (
            Plain(),
            AdaptivePerturbation(40, generator=torch.Generator().manual_seed(seed)),
        ):
            torch.manual_seed(seed)
            row.append(fit(SmallUNet(8), criterion, seed))
        rows.append(row)
        print(f"seed {seed}: ECE {row[0]:.4f} of BCE, {row[1]:.4f} of the default")
    return rows


@pytest.mark.slow
def test_lightning_ends_better_calibrated_than_bce(page):
    train, validation, test = scenes()

    class Segmenter(page["Segmenter"]):
        def configure_optimizers(self):
            optimizer = torch.optim.Adam(self.parameters(), lr=5e-3)
            return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)]

    def fit(network, criterion, seed):
        order = torch.Generator().manual_seed(seed)
        dataset = IndexedDataset(TensorDataset(*train))
        adaptive = isinstance(criterion, AdaptivePerturbation)
        quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False)
        L.Trainer(
            max_epochs=EPOCHS, accelerator="cpu", enable_checkpointing=False, **quiet,
            callbacks=[AdaptivePerturbationCallback()] if adaptive else [],
        ).fit(
            Segmenter(network, criterion),
            DataLoader(dataset, 10, shuffle=True, generator=order),
            DataLoader(TensorDataset(*validation), 40),
        )  # fmt: skip
        return ece(network, *test)

    for plain, adaptive in twins(fit):
        assert 0.04 < plain < 0.10
        assert adaptive < min(0.04, 0.7 * plain)


@pytest.mark.slow
def test_the_trainer_ends_better_calibrated_than_bce(page, tmp_path):
    train, validation, test = scenes()

    class Dense(nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, image):
            return {"logits": self.network(image)}

    def dataset(part):
        return [{"image": image, "labels": mask} for image, mask in zip(*part, strict=True)]

    class Twin(page["AdaptiveTrainer"]):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            if isinstance(self.criterion, Plain):
                self.remove_callback(page["AdaptiveCallback"])

    def fit(network, criterion, seed):
        arguments = dataclasses.replace(
            page["arguments"], output_dir=str(tmp_path), num_train_epochs=EPOCHS, seed=seed,
            per_device_train_batch_size=10, per_device_eval_batch_size=40, learning_rate=5e-3,
            lr_scheduler_type="cosine", save_strategy="no", disable_tqdm=True, max_grad_norm=0.0,
        )  # fmt: skip
        Twin(
            Dense(network), arguments, criterion=criterion, compute_metrics=page["Calibration"](),
            train_dataset=IndexedDataset(dataset(train)), eval_dataset=dataset(validation),
        ).train()  # fmt: skip
        return ece(network, *test)

    for plain, adaptive in twins(fit):
        assert 0.04 < plain < 0.10
        assert adaptive < min(0.04, 0.7 * plain)
