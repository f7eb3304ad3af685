"""The adaptive loss through everything of torch that stores, copies, moves or shares state."""

import copy
import io
import math
import pickle
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from devices import lacks
from ranks import run
from tables import assert_same, build, moving, saved, trained
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.testing import assert_close

# Everything that a state can hold.
WHOLE = dict(
    focus=1.0, beta=1.0, prior="observed", num_labels=3, lr=0.05, penalty=20.0, warmup=1,
    objective="feedback", sampling="element",
)  # fmt: skip


def generator(seed=7):
    return torch.Generator().manual_seed(seed)


def whole(rows=6, **options):
    """A table within its third epoch, all of whose state has moved."""
    criterion = build(rows, generator=generator(), **{**WHOLE, **options})
    for accuracy in (0.7, 0.8):
        trained(criterion).step(accuracy, 0.95)
    return trained(criterion, seed=1)


def fresh(rows=6, **options):
    return build(rows, generator=generator(0), **{**WHOLE, **options})


# --- casts and moves --------------------------------------------------------------------------


def test_casting_moves_weights_and_spares_the_table():
    criterion = whole(pos_weight=torch.ones(1))
    before = saved(criterion)
    casts = (criterion.half, criterion.double, lambda: criterion.to(torch.bfloat16),
             lambda: criterion.type(torch.float64), criterion.bfloat16)  # fmt: skip
    for cast in casts:
        cast()
        assert criterion.alpha.dtype == criterion.sample_accuracy.dtype == torch.float32
        assert criterion.visited.dtype == torch.uint8
        assert_same(criterion, before, but=["pos_weight"])
        assert float(criterion._cap) == pytest.approx(float(whole()._cap))
    assert criterion.pos_weight.dtype == torch.bfloat16
    assert criterion.to("meta").alpha.is_meta
    assert "mean_alpha" not in repr(criterion)


@pytest.mark.parametrize("default", [torch.float64, torch.float16])
def test_the_table_is_float32_whatever_torchs_default(default):
    torch.set_default_dtype(default)
    try:
        criterion = moving(6, focus=1.0, ignore_index=255)
        x, y = torch.ones(2, 3, dtype=torch.float32), torch.ones(2, 3, dtype=torch.uint8)
        criterion(x, y, torch.tensor([1, 2]))
    finally:
        torch.set_default_dtype(torch.float32)
    floats = {k: v for k, v in criterion.state_dict().items() if v.is_floating_point()}
    names = "alpha sample_accuracy setting accuracy best_accuracy budget difficulty"
    assert sorted(floats) == sorted(names.split())
    assert all(value.dtype == torch.float32 for value in floats.values())
    assert criterion.alpha[1] > 0


# --- copies -----------------------------------------------------------------------------------


def through_pickle(criterion):
    return pickle.loads(pickle.dumps(criterion))


def through_torch(criterion):
    file = io.BytesIO()
    torch.save(criterion, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_its_state(criterion):
    file = io.BytesIO()
    torch.save(criterion.state_dict(), file)
    file.seek(0)
    other = fresh()
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


def through_safetensors(criterion):
    safetensors = pytest.importorskip("safetensors.torch")
    other = fresh()
    state = safetensors.load(safetensors.save(criterion.state_dict()))
    other.load_state_dict(state)
    return other


COPIES = [copy.deepcopy, through_pickle, through_torch, through_its_state, through_safetensors]


@pytest.mark.parametrize("copied", COPIES)
def test_a_copy_is_the_same_goes_on_alike_and_is_independent(copied):
    criterion = whole()
    before = saved(criterion)
    twin = copied(criterion)
    assert_same(twin, before)
    trained(twin, seed=2).step(0.9, 0.95)
    trained(twin, seed=3)
    assert_same(criterion, before)
    trained(criterion, seed=2).step(0.9, 0.95)
    trained(criterion, seed=3)
    assert_same(twin, saved(criterion))
    assert not torch.equal(twin.alpha, before["alpha"])


def test_a_state_dict_is_a_copy_either_way():
    criterion = whole()
    state = criterion.state_dict()
    before = {name: value.clone() for name, value in state.items()}
    trained(criterion, seed=2)
    assert_same(state, before)
    for assign in (False, True):
        other = fresh()
        other.load_state_dict(state, assign=assign)
        trained(other, seed=2).step(0.8, 0.9)
        assert_same(state, before)


def test_a_whole_model_through_safetensors_and_accelerate(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    accelerate = pytest.importorskip("accelerate")
    model = nn.ModuleDict({"net": nn.Linear(4, 3), "criterion": whole()})
    before = saved(model["criterion"])
    safetensors.save_model(model, str(tmp_path / "model.safetensors"))
    other = nn.ModuleDict({"net": nn.Linear(4, 3), "criterion": fresh()})
    safetensors.load_model(other, str(tmp_path / "model.safetensors"))
    assert_same(other["criterion"], before)
    accelerator = accelerate.Accelerator(cpu=True)
    prepared = accelerator.prepare(model)
    accelerator.save_state(str(tmp_path / "state"))
    trained(model["criterion"], seed=2)
    accelerator.load_state(str(tmp_path / "state"))
    assert_same(prepared["criterion"], before)


@pytest.mark.parametrize("buffers", [False, True])
def test_an_averaged_model_keeps_a_whole_table(buffers):
    model = nn.ModuleDict({"net": nn.Linear(4, 3), "criterion": whole()})
    before = saved(model["criterion"])
    averaged = AveragedModel(model, use_buffers=buffers)
    trained(model["criterion"], seed=2)
    for _ in range(2):
        averaged.update_parameters(model)
    assert_same(averaged.module["criterion"], before)
    averaged.load_state_dict(averaged.state_dict())
    assert_same(averaged.module["criterion"], before)


# --- loading ----------------------------------------------------------------------------------


def test_every_key_of_the_state_is_found_by_name():
    # torch.distributed.checkpoint finds a model's state so.
    model = nn.ModuleDict({"criterion": whole(pos_weight=torch.ones(1))})
    assert set(get_model_state_dict(model)) == set(model.state_dict())
    listed = dict(model["criterion"].named_buffers(recurse=False))
    assert set(listed) - {"pos_weight"} == set(whole().state_dict())
    # DistributedDataParallel asks its root for all buffers, and overwrites what it finds.
    assert [name for name, _ in model.named_buffers()] == ["criterion.pos_weight"]
    assert [name for name, _ in model["criterion"].named_buffers()] == ["pos_weight"]


@pytest.mark.parametrize("assign", [False, True])
def test_loading_keeps_dtypes(assign):
    source = whole()
    state = {k: v if k == "generator" else v.double() for k, v in saved(source).items()}
    other = fresh()
    other.load_state_dict(state, assign=assign)
    assert_same(other, saved(source))
    assert torch.equal(other.prior, source.prior)
    assert other.epoch.steps.dtype == other.counts.dtype == torch.int64


def test_loading_follows_the_state_at_once():
    source, other = whole(), fresh()
    assert ", warming up 0/1)" in repr(other)
    other.load_state_dict(source.state_dict())
    assert "warming up" not in repr(other)
    assert torch.equal(other.prior, source.prior)
    assert torch.equal(other.doubt, source.doubt)
    assert other.doubt > 0


def test_loading_reports_missing_and_unexpected_keys():
    state = moving(3, generator=torch.Generator()).state_dict()
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"generator"'):
        build(3).load_state_dict(state)
    build(3).load_state_dict(state, strict=False)
    del state["budget"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"budget"'):
        build(3, generator=torch.Generator()).load_state_dict(state)
    result = build(3).load_state_dict(state, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["budget"], ["generator"])
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"level"'):
        moving(3).load_state_dict(moving(3).state_dict() | {"level": torch.zeros(3)})


def test_a_hook_may_rename_keys_while_loading():
    source = moving(3)
    source.alpha.fill_(0.2)
    state = source.state_dict()
    state["levels"] = state.pop("alpha")
    criterion = build(3)
    handle = criterion.register_load_state_dict_pre_hook(
        lambda module, state, *rest: state.update(alpha=state.pop("levels"))
    )
    criterion.load_state_dict(state)
    assert torch.equal(criterion.alpha, source.alpha)
    assert "levels" in state
    handle.remove()
    with pytest.raises(RuntimeError, match=r'Missing key.*"alpha"'):
        criterion.load_state_dict(state)


def spoilt(**changed):
    return lambda: whole().state_dict() | changed


half = dict(beta=1.0, prior=0.5, num_labels=None)
REFUSED = {
    "rows": (dict(rows=6), lambda: whole(9).state_dict(),
             "num_samples=6, but got 9 levels; build the criterion with that number, load, then "
             "`resize`"),
    "no focus": (dict(focus=0.0), lambda: whole().state_dict(),
                 "focus=0, but got focus above 0; build the criterion with that focus"),
    "focus": (dict(), lambda: whole(focus=0.0).state_dict(),
              "focus=1, but got focus=0; build the criterion with that focus"),
    "other focus": (dict(), lambda: whole(focus=2.5).state_dict(),
                    "focus=1, but got focus=2.5; build the criterion with that focus"),
    "objective": (dict(objective="calibration"), lambda: whole().state_dict(),
                  "objective='calibration', but got objective='feedback'; build the criterion "
                  "with that objective"),
    "labels": (dict(num_labels=None), lambda: whole().state_dict(),
               "`counts` of shape (3, 1), but got shape (3, 3); build both criteria with the same "
               "arguments"),
    "strength": (dict(half, beta=2.0),
                 lambda: whole(**half).state_dict() | {"alpha": torch.full((6,), 0.8)},
                 "levels in [0, 0.49], the cap at beta=2, but got a level of 0.8; build the "
                 "criterion with the beta and prior that it was trained with"),
    "prior": (dict(half, prior=0.1),
              lambda: whole(**half).state_dict() | {"alpha": torch.full((6,), 0.6)},
              "levels in [0, 0.5456], the cap at beta=1, but got a level of 0.6; "),
    "observed prior": (dict(), spoilt(alpha=torch.full((6,), 0.97), counts=torch.tensor(
        [[9, 9, 9], [0, 4 << 20, 0], [0, 4, 0]])),
        "levels in [0, 0.5163], the cap at beta=1, but got a level of 0.97; "),
    "negative": (dict(), spoilt(alpha=torch.full((6,), -0.1)), "levels in [0, "),
    "nan": (dict(), spoilt(alpha=torch.full((6,), math.nan)), "but got a level of nan; "),
    "scalar": (dict(), spoilt(accuracy=torch.zeros(3)),
               "`accuracy` of shape (), but got shape (3,); "),
    "rows of visits": (dict(), spoilt(visited=torch.zeros(1, dtype=torch.uint8)),
                       "`visited` of shape (6,), but got shape (1,); "),
    "weights": (dict(pos_weight=torch.ones(2)),
                lambda: whole(pos_weight=torch.full((3,), 2.0)).state_dict(),
                "`pos_weight` of shape (2,), but got shape (3,); "),
    "generator": (dict(), spoilt(generator=torch.zeros(16, dtype=torch.uint8)),
                  "a generator on cpu, but got the state of one on another device; "),
}  # fmt: skip


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", REFUSED)
def test_a_state_of_another_table_is_refused_whole(name, strict):
    options, source, text = REFUSED[name]
    criterion = fresh(**options)
    before = saved(criterion)
    state = source()
    for assign in (False, True):
        with pytest.raises(RuntimeError, match=r"Error\(s\) in loading state_dict") as caught:
            criterion.load_state_dict(state, strict=strict, assign=assign)
        assert f"Expected the saved table to have {text}" in str(caught.value) or text in str(
            caught.value
        )
        assert str(caught.value).count("\n\t") == 1  # one sentence
        assert_same(criterion, before)
        assert torch.equal(criterion.generator.get_state(), generator(0).get_state())


def test_a_refusal_names_the_module_within_a_model_and_spares_the_table():
    model = nn.ModuleDict({"net": nn.Linear(2, 2), "criterion": fresh()})
    other = nn.ModuleDict({"net": nn.Linear(2, 2), "criterion": whole(9)})
    before = saved(model["criterion"])
    with pytest.raises(RuntimeError, match="num_samples=6, but got 9 levels"):
        model.load_state_dict(other.state_dict())
    assert_same(model["criterion"], before)


def test_levels_at_the_cap_load():
    for options in (dict(beta=2.0, prior=0.5), dict(beta=1.3, prior=0.3),
                    dict(beta=1.0, prior=torch.tensor([0.02, 0.3, 0.7]))):  # fmt: skip
        options = {**WHOLE, "num_labels": None, **options}
        source = build(4, **options)
        trained(source, labels=3).step(0.9, 0.95)
        source.alpha.fill_(float(source._cap))
        build(4, **options).load_state_dict(source.state_dict())


# --- version 0.1 ------------------------------------------------------------------------------

# Made by version 0.1.0: the table below after its second step, one batch later, and what it did
# in the four batches and the step that followed.
V01 = Path(__file__).parent / "data" / "v0.1.0.pt"


def of_v01(rows=6, **options):
    setting = dict(
        beta=2.0, objective="feedback", lr=0.02, penalty=20.0, warmup=1, focus=1.0,
        sampling="element", pos_weight=torch.tensor([1.0, 2.0]),
    )  # fmt: skip
    return build(rows, **{**setting, **options})


def batches_of_v01(start, stop):
    source = torch.Generator().manual_seed(5)
    for number in range(stop):
        x, index = 4 * torch.randn(3, 2, generator=source), torch.arange(3) + 3 * (number % 2)
        y = (x + 4 * torch.randn(3, 2, generator=source) > 0).float()
        if number >= start:
            yield x, y, index


@pytest.mark.parametrize("assign", [False, True])
def test_a_checkpoint_of_version_0_1_goes_on_as_version_0_1_did(assign):
    file = torch.load(V01, weights_only=True)
    for name, seen_before in (("after a step", 4), ("within an epoch", 5)):
        source = torch.Generator()
        criterion = of_v01(generator=source)
        criterion.load_state_dict(file[name], assign=assign)
        assert torch.equal(source.get_state(), file[name]["generator"].reshape(-1))
        want = torch.where(file[name]["moved"], 2, torch.where(file[name]["seen"], 1, 0))
        assert torch.equal(criterion.visited, want.to(torch.uint8))
        losses = [float(criterion(*batch)) for batch in batches_of_v01(seen_before, 6)]
        criterion.step(0.8, 0.95)
        losses += [float(criterion(*batch)) for batch in batches_of_v01(6, 9)]
        assert losses[-4:] == file["losses"].tolist()
        for key, value in file["end"].items():
            if key not in ("moved", "seen"):
                assert torch.equal(criterion.state_dict()[key], value), key


def test_a_checkpoint_of_version_0_1_is_judged_as_any_other():
    state = torch.load(V01, weights_only=True)["after a step"]
    cases = [
        (of_v01(5, generator=generator()), "num_samples=5, but got 6 levels"),
        (of_v01(focus=0.0, generator=generator()), "focus=0, but got focus above 0"),
        (of_v01(beta=2.0, prior=0.5), 'Unexpected key.*"generator"'),
    ]
    for criterion, text in cases:
        with pytest.raises(RuntimeError, match=text):
            criterion.load_state_dict(state)
        if "Unexpected" not in text:
            assert (criterion.alpha == 0).all()
    high = state | {"alpha": torch.full((6,), 0.7)}  # of beta 1
    with pytest.raises(RuntimeError, match=r"levels in \[0, 0.49\], .* but got a level of 0.7"):
        of_v01(generator=generator()).load_state_dict(high)


def test_a_checkpoint_of_version_0_1_without_focus():
    state = torch.load(V01, weights_only=True)["within an epoch"]
    del state["sample_accuracy"], state["seen"], state["generator"]
    criterion = of_v01(focus=0.0)
    criterion.load_state_dict(state)
    levels = state["alpha"]
    want = [2 if moved else int(level > 0) for moved, level in zip(state["moved"], levels)]  # noqa: B905
    assert criterion.visited.tolist() == want
    assert torch.equal(criterion.alpha, levels)


def test_a_checkpoint_of_several_ranks_of_version_0_1_serves_one_process():
    state = torch.load(V01, weights_only=True)["after a step"]
    criterion = of_v01(generator=torch.Generator())
    state["generator"] = torch.stack([generator(seed).get_state() for seed in (3, 4)])
    criterion.load_state_dict(state)
    assert torch.equal(criterion.generator.get_state(), generator(3).get_state())
    assert criterion.state_dict()["generator"].dim() == 1


# --- the meta device --------------------------------------------------------------------------


def built_on_meta():
    with torch.device("meta"):
        criterion = build(6, **WHOLE)
    assert criterion.alpha.is_meta
    return criterion


@pytest.mark.parametrize("emptied", [False, True])
@pytest.mark.parametrize("assign", [False, True])
def test_built_on_meta_and_loaded(emptied, assign):
    source = whole()
    state = {name: value for name, value in saved(source).items() if name != "generator"}
    criterion = built_on_meta()
    if emptied:
        criterion.to_empty(device="cpu")
    criterion.load_state_dict(state, assign=assign)
    criterion.generator = copy.deepcopy(source.generator)
    assert_same(criterion, saved(source))
    trained(criterion, seed=2).step(0.8, 0.9)
    trained(source, seed=2).step(0.8, 0.9)
    assert_same(criterion, saved(source))


def test_built_on_meta_emptied_and_reset():
    criterion = built_on_meta().to_empty(device="cpu")
    criterion.alpha.fill_(math.nan)  # whatever lay in memory
    criterion.epoch.steps.fill_(99)
    criterion.reset_parameters()
    assert_same(criterion, saved(build(6, **WHOLE)))
    assert ", warming up 0/1)" in repr(criterion)
    twin = build(6, **WHOLE)
    for one in (criterion, twin):
        torch.manual_seed(1)
        trained(one).step(0.8, 0.9)
        trained(one)
    assert_same(criterion, saved(twin))


def test_reset_starts_again():
    criterion = whole(prior=0.3)
    criterion.reset_parameters()
    assert_same(criterion, saved(fresh(prior=0.3)), but=["generator"])
    assert criterion._past_warmup is False


# --- exact resume -----------------------------------------------------------------------------


class Training:
    """A small network and its loss, batch by batch."""

    def __init__(self, rank=0, model_seed=0, **options):
        torch.manual_seed(model_seed)
        self.net = nn.Linear(4, 3)
        self.criterion = build(10, generator=generator(7 + rank), **{**WHOLE, **options})
        self.model = nn.ModuleDict({"net": self.net, "criterion": self.criterion})
        self.losses = []

    def batch(self, number, rank=0):
        data = torch.Generator().manual_seed(3)
        x, y = torch.randn(10, 4, generator=data), torch.randint(0, 2, (10, 3), generator=data)
        rows = torch.arange(10).roll(3 * number + 5 * rank)[:2]
        loss = self.criterion(self.net(x[rows]), y[rows], rows)
        gradients = torch.autograd.grad(loss, list(self.net.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(self.net.parameters(), gradients, strict=True):
                if dist.is_initialized():
                    dist.all_reduce(gradient)
                parameter -= 0.5 * gradient
        self.losses.append(loss.item())

    def end(self, epoch):
        self.criterion.step(0.7 + 0.01 * epoch, 0.95)

    def result(self):
        return self.losses[-6:], {k: v.clone() for k, v in self.model.state_dict().items()}


def alone(rank, world, mode, path, objective, stop):
    training = Training(objective=objective, model_seed=int(mode == "resume"))
    start = 0
    if mode == "resume":
        training.model.load_state_dict(torch.load(path, weights_only=True))
        start = stop
    for number in range(start, 24):
        if mode == "stop" and number == stop:
            torch.save(training.model.state_dict(), path)
            return None
        training.batch(number)
        if number % 5 == 4:
            training.end(number)
    return training.result()


@pytest.mark.parametrize(
    ("objective", "stop"),
    [("calibration", 13), ("max_entropy", 17), ("feedback", 2), ("feedback", 13)],
)
def test_resume_in_another_process_is_exact(tmp_path, objective, stop):
    path = str(tmp_path / "c.pt")
    alone(0, 1, "stop", path, objective, stop)
    (straight,) = run(1, alone, "straight", path, objective, stop)
    (resumed,) = run(1, alone, "resume", path, objective, stop)
    assert resumed[0] == straight[0]
    assert_same(resumed[1], straight[1])
    assert (straight[1]["criterion.alpha"] > 0).any()


def together(rank, world, path, tool, when):
    """Straight, and through a checkpoint of `tool`, after a step or within an epoch."""
    results = []
    for resumed in (False, True):
        training = Training(rank)
        for epoch in range(4):
            for number in range(2):
                training.batch(2 * epoch + number, rank)
                if resumed and when == "within an epoch" and (epoch, number) == (1, 1):
                    training = reloaded(training, rank, path, tool)
            training.end(epoch)
            if resumed and when == "after a step" and epoch == 1:
                training = reloaded(training, rank, path, tool)
        results.append(training.result())
    return results


def reloaded(training, rank, path, tool):
    other = Training(5, model_seed=9)
    other.losses = training.losses
    if tool == "torch.save":
        torch.save(training.model.state_dict(), f"{path}/{rank}.pt")
        other.model.load_state_dict(torch.load(f"{path}/{rank}.pt", weights_only=True))
        return other
    dcp.save({"model": training.model.state_dict()}, checkpoint_id=path)
    state = {"model": other.model.state_dict()}
    dcp.load(state, checkpoint_id=path)
    other.model.load_state_dict(state["model"])
    return other


@pytest.mark.parametrize(
    ("tool", "when"),
    [("torch.save", "within an epoch"), ("torch.save", "after a step"), ("dcp", "after a step")],
)
def test_resume_in_two_processes_is_exact(tmp_path, tool, when):
    ranks = run(2, together, str(tmp_path), tool, when)
    for straight, resumed in ranks:
        assert resumed[0] == straight[0]
        assert_same(resumed[1], straight[1])
    assert ranks[0][0][0] != ranks[1][0][0]  # each its own draws and batches
    assert (ranks[0][0][1]["criterion.alpha"] > 0).any()


# --- torch.distributed.checkpoint -------------------------------------------------------------


ROWS = 32


class Model(nn.Module):
    def __init__(self, seed=0, **options):
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
        self.criterion = build(ROWS, **{**WHOLE, "pos_weight": torch.ones(3), **options})

    def forward(self, x, y, index):
        return self.criterion(self.net(x), y, index)


def batch(number):
    data = torch.Generator().manual_seed(number)
    x = 3 * torch.randn(4, 4, generator=data)
    return x, (x[:, :3] > 0).float(), torch.randperm(ROWS, generator=data)[:4]


def run_model(model, rank, step):
    for number in range(2):
        model(*batch(10 * rank + number)).backward()
    criterion = getattr(model, "module", model).criterion
    criterion.step(0.8, 0.95)
    model(*batch(10 * rank + 2)).backward()
    if step:
        criterion.step(0.8, 0.95)
    return model


def dcp_save(rank, world, path, step, drawn):
    model = Model(generator=generator(rank) if drawn else None)
    run_model(model, 0, step)  # ranks alike, also within an epoch
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=path)
    return saved(model.criterion)


def dcp_load(rank, world, path, drawn):
    model = Model(seed=1, generator=generator(9) if drawn else None)
    before = saved(model.criterion)
    state = {"model": get_model_state_dict(model)}
    dcp.load(state, checkpoint_id=path)
    assert_same(model.criterion, before)  # nothing is loaded before it is judged
    set_model_state_dict(model, state["model"])
    repr(model)
    return saved(model.criterion)


@pytest.mark.parametrize("drawn", [False, True], ids=["global draws", "own draws"])
@pytest.mark.parametrize("step", [False, True], ids=["within an epoch", "after a step"])
@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (1, 2)])
def test_distributed_checkpoints_load_at_any_number_of_processes(
    tmp_path, before, after, step, drawn
):
    source = run(before, dcp_save, str(tmp_path), step, drawn)
    loaded = run(after, dcp_load, str(tmp_path), drawn)
    assert (source[0]["alpha"] > 0).any()
    for rank, state in enumerate(loaded):
        assert_same(state, source[0], but=["generator"])
        if drawn and step and rank < before:  # each rank its own generator again
            assert torch.equal(state["generator"], source[rank]["generator"])
    if drawn and step and after == 2:
        assert not torch.equal(loaded[0]["generator"], loaded[1]["generator"])


def dcp_refused(rank, world, path):
    model = Model(beta=2.0, prior=0.5, num_labels=None)
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=path)
    messages = []
    for options in (dict(objective="calibration"), dict(focus=2.0)):
        other = Model(beta=2.0, prior=0.5, num_labels=None, **options)
        before = saved(other.criterion)
        state = {"model": get_model_state_dict(other)}
        dcp.load(state, checkpoint_id=path)
        try:
            set_model_state_dict(other, state["model"])
        except RuntimeError as error:
            messages.append(str(error).splitlines()[-1].strip())
        assert_same(other.criterion, before)
    return messages


def test_a_distributed_checkpoint_of_another_table_is_refused(tmp_path):
    start = "Expected the saved table to have"
    assert (
        run(2, dcp_refused, str(tmp_path))
        == [
            [
                f"{start} objective='calibration', but got objective='feedback'; build the "
                "criterion with that objective",
                f"{start} focus=2, but got focus=1; build the criterion with that focus",
            ]
        ]
        * 2
    )


# --- FSDP2 ------------------------------------------------------------------------------------


def sharded(model):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model.net[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def fsdp(rank, world, path):
    plain = run_model(Model(generator=generator(rank)), rank, True)
    model = run_model(sharded(Model(generator=generator(rank))), rank, True)
    want = saved(model.criterion)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.step()

    def options(**given):
        return StateDictOptions(**given)

    full = options(full_state_dict=True)
    offload = options(full_state_dict=True, cpu_offload=True)
    broadcast = options(full_state_dict=True, broadcast_from_rank0=True)
    states = {
        "sharded": (get_model_state_dict(model), None),
        "full": (get_model_state_dict(model, options=full), full),
        "broadcast": (get_model_state_dict(model, options=offload), broadcast),
    }
    assert (len(states["broadcast"][0]) == 0) == (rank > 0)
    got = {}
    for name, (state, how) in states.items():
        other = sharded(Model(seed=1, generator=generator(9)))
        result = set_model_state_dict(other, dict(state), options=how)
        assert (result.missing_keys, result.unexpected_keys) == ([], [])
        got[name] = saved(other.criterion)
        weights = [one.full_tensor() for one in (other.net[0].weight, model.net[0].weight)]
        assert torch.equal(*weights)
    with torch.device("meta"):
        other = Model(generator=generator(9))
    sharded(other)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of its own functions
        set_model_state_dict(other, dict(states["broadcast"][0]), options=broadcast)
    got["meta, broadcast"] = saved(other.criterion)
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=path)
    other = sharded(Model(seed=1, generator=generator(9)))
    state = {"model": get_model_state_dict(other)}
    dcp.load(state, checkpoint_id=path)
    set_model_state_dict(other, state["model"])
    got["dcp"] = saved(other.criterion)
    run_model(other, rank, True)  # and it trains on
    return saved(plain.criterion), want, got


@lacks((2, 6), "has no FSDP2 on a CPU")
def test_fsdp2_trains_saves_and_loads_with_the_loss_inside_the_model(tmp_path):
    ranks = run(2, fsdp, str(tmp_path))
    for plain, want, got in ranks:
        assert (want["alpha"] > 0).any()
        assert_same(want, plain)
        for state in got.values():
            assert_same(state, want)
    assert_same(ranks[0][1], ranks[1][1], but=["generator"])


# --- DistributedDataParallel ------------------------------------------------------------------


def ddp(rank, world, inside):
    """Two batches per step of the network, the first without synchronisation."""
    model = Model(sampling="expected")
    criterion = model.criterion
    if inside:
        wrapped = DistributedDataParallel(model)
        loss = wrapped
    else:
        net = DistributedDataParallel(model.net)

        def loss(x, y, index):
            return criterion(net(x), y, index)

        wrapped = net
    with wrapped.no_sync():
        loss(*batch(10 * rank)).backward()
    loss(*batch(10 * rank + 1)).backward()
    criterion.step(0.8, 0.95)
    with wrapped.no_sync():
        loss(*batch(10 * rank + 2)).backward()
    loss(*batch(10 * rank + 3)).backward()
    within = saved(criterion)
    criterion.step(0.8, 0.95)
    return within, saved(criterion)


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
def test_ddp_with_default_options_and_no_sync_leaves_each_ranks_table_alone(inside):
    (first, one), (second, two) = run(2, ddp, inside)
    assert_same(one, two)
    rows = [set(torch.cat([batch(10 * r + n)[2] for n in (2, 3)]).tolist()) for r in (0, 1)]
    for state, own in zip((first, second), rows, strict=True):
        assert set((state["visited"] == 2).nonzero().flatten().tolist()) == own
    assert not torch.equal(first["alpha"], second["alpha"])
    assert first["fresh"].sum() > 0
    assert one["fresh"].sum() == 0
    for row in range(ROWS):
        movers = [
            s["alpha"][row] for s, own in zip((first, second), rows, strict=True) if row in own
        ]
        if movers:
            assert_close(one["alpha"][row], sum(movers) / len(movers))
