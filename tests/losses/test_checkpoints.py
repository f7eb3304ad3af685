"""The adaptive loss through everything of torch that stores, copies, moves or shares state."""

import copy
import io
import math
import pickle
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from devices import lacks
from ranks import run
from tables import Measured, assert_same, build, moving, published, put, saved, trained
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

# Everything that a state can hold, by either rule.
WHOLE = dict(focus=1.0, num_labels=3, sampling="element")
CLIMBS = dict(
    objective="max_entropy", beta=1.0, prior="observed", num_labels=3, lr=0.05, penalty=20.0,
    warmup=1, sampling="element",
)  # fmt: skip
both = pytest.mark.parametrize("rule", ["slope", "published"])


def generator(seed=7):
    return torch.Generator().manual_seed(seed)


def made(rows=6, rule="slope", **options):
    if rule == "slope":
        return build(rows, **{**WHOLE, **options})
    return published(rows, **{**CLIMBS, **options})


def whole(rows=6, rule="slope", **options):
    """A table within its third epoch, all of whose state has moved."""
    criterion = made(rows, rule, **{"generator": generator(), **options})
    for accuracy in (0.7, 0.8):
        trained(criterion).step(Measured(accuracy, accuracy))
    return trained(criterion, seed=1)


def fresh(rows=6, rule="slope", **options):
    return made(rows, rule, **{"generator": generator(0), **options})


# -- casts and moves


@both
def test_casting_moves_weights_and_spares_the_table(rule):
    criterion = whole(rule=rule, pos_weight=torch.ones(1))
    twin, before = whole(rule=rule, pos_weight=torch.ones(1)), saved(criterion)
    casts = (criterion.half, criterion.double, lambda: criterion.to(torch.bfloat16),
             lambda: criterion.type(torch.float64), criterion.bfloat16)  # fmt: skip
    for cast in casts:
        cast()
        assert criterion.alpha.dtype == torch.float32
        assert_same(criterion, before, but=["pos_weight"])
        assert criterion.prior.dtype == torch.float32
    assert criterion.pos_weight.dtype == torch.bfloat16
    for one in (criterion, twin):  # and it goes on as if nothing had been
        trained(one, seed=2).step(Measured())
    assert_same(criterion, saved(twin), but=["pos_weight"])
    assert criterion.to("meta").alpha.is_meta
    assert "mean_alpha" not in repr(criterion)


def test_a_cast_spares_a_prior_that_is_a_tensor():
    prior = torch.tensor([0.1, 0.2, 0.3])
    criterion = made(num_labels=None, prior=prior).bfloat16()
    assert torch.equal(criterion.prior, prior)
    assert list(criterion.state_dict()) == list(made(num_labels=None, prior=0.5).state_dict())


@pytest.mark.parametrize("default", [torch.float64, torch.float16])
def test_the_table_is_float32_whatever_torchs_default(default):
    torch.set_default_dtype(default)
    try:
        criterion = moving(6, focus=1.0, ignore_index=255)
        x, y = torch.ones(2, 3, dtype=torch.float32), torch.ones(2, 3, dtype=torch.uint8)
        criterion(x.requires_grad_(), y, torch.tensor([1, 2]))
        criterion.step(Measured())
    finally:
        torch.set_default_dtype(torch.float32)
    floats = {k: v for k, v in criterion.state_dict().items() if v.is_floating_point()}
    names = "alpha sample_accuracy setting mean_level counts elements positives"
    assert sorted(floats) == sorted(names.split())
    assert all(value.dtype == torch.float32 for value in floats.values())
    assert criterion.prior.dtype == torch.float32


# -- copies


def through_pickle(criterion):
    return pickle.loads(pickle.dumps(criterion))


def through_torch(criterion):
    file = io.BytesIO()
    torch.save(criterion, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def empty_like(criterion):
    return fresh(rule="slope" if "mean_level" in criterion.state_dict() else "published")


def through_its_state(criterion):
    file = io.BytesIO()
    torch.save(criterion.state_dict(), file)
    file.seek(0)
    other = empty_like(criterion)
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


def through_safetensors(criterion):
    safetensors = pytest.importorskip("safetensors.torch")
    other = empty_like(criterion)
    state = safetensors.load(safetensors.save(criterion.state_dict()))
    other.load_state_dict(state)
    return other


COPIES = [copy.deepcopy, through_pickle, through_torch, through_its_state, through_safetensors]


@both
@pytest.mark.parametrize("copied", COPIES)
def test_a_copy_is_the_same_goes_on_alike_and_is_independent(copied, rule):
    criterion = whole(rule=rule)
    before = saved(criterion)
    twin = copied(criterion)
    assert_same(twin, before)
    trained(twin, seed=2).step(Measured())
    trained(twin, seed=3)
    assert_same(criterion, before)
    trained(criterion, seed=2).step(Measured())
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
        trained(other, seed=2).step(Measured())
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


# -- loading


def test_every_key_of_the_state_is_found_by_name():
    # torch.distributed.checkpoint finds a model's state so.
    model = nn.ModuleDict({"criterion": whole(pos_weight=torch.ones(1))})
    assert set(get_model_state_dict(model)) == set(model.state_dict())
    listed = dict(model["criterion"].named_buffers(recurse=False))
    assert set(listed) - {"pos_weight"} == set(whole().state_dict())
    # DistributedDataParallel asks its root for all buffers, and overwrites what it finds.
    assert [name for name, _ in model.named_buffers()] == ["criterion.pos_weight"]
    assert [name for name, _ in model["criterion"].named_buffers()] == ["pos_weight"]


@both
@pytest.mark.parametrize("assign", [False, True])
def test_loading_keeps_dtypes(assign, rule):
    source = whole(rule=rule)
    state = {k: v if k == "generator" else v.double() for k, v in saved(source).items()}
    other = fresh(rule=rule)
    other.load_state_dict(state, assign=assign)
    assert_same(other, saved(source))
    assert torch.equal(other.prior, source.prior)
    assert other.state_dict()["steps"].dtype == torch.int64


def test_loading_follows_the_state_at_once():
    source, other = whole(), fresh()
    assert ", warming up 0/1)" in repr(other)
    other.load_state_dict(source.state_dict())
    assert "warming up" not in repr(other)
    assert torch.equal(other.prior, source.prior)
    assert torch.equal(torch.stack(other.flip_rates), torch.stack(source.flip_rates))
    assert other.flip_rates[0].min() > 0


def test_loading_reports_missing_and_unexpected_keys():
    state = moving(3, generator=torch.Generator()).state_dict()
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"generator"'):
        build(3).load_state_dict(state)
    build(3).load_state_dict(state, strict=False)
    del state["mean_level"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"mean_level"'):
        build(3, generator=torch.Generator()).load_state_dict(state)
    result = build(3).load_state_dict(state, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["mean_level"], ["generator"])
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"level"'):
        moving(3).load_state_dict(moving(3).state_dict() | {"level": torch.zeros(3)})


def test_a_hook_may_rename_keys_while_loading():
    source = put(moving(3), alpha=0.3)
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


def without(*names):
    return lambda: {k: v for k, v in whole().state_dict().items() if k not in names}


half = dict(beta=1.0, prior=0.5, num_labels=None)
LEVELS = "Expected the saved levels to "
REFUSED = {
    "rows": (dict(rows=6), lambda: whole(9).state_dict(),
             LEVELS + "have 6 levels, but got 9; build the criterion with num_samples=9"),
    "fewer rows": (dict(rows=6), lambda: whole(4).state_dict(),
                   "got 4; build the criterion with num_samples=4, load, then `resize(6)`"),
    "no focus": (dict(focus=0.0), lambda: whole().state_dict(),
                 LEVELS + "be of the rule FollowSlope(level=0.2, focus=0.0), but got one of the "
                 "default rule with focus=1; build the criterion with that rule"),
    "focus": (dict(), lambda: whole(focus=0.0).state_dict(), "the default rule with focus=0; "),
    "other focus": (dict(), lambda: whole(focus=2.5).state_dict(), "rule with focus=2.5; build"),
    "rule": (dict(), lambda: whole(rule="published").state_dict(),
             "focus=1.0), but got one of the published rule for max_entropy; build"),
    "other rule": (dict(rule="published"), lambda: whole().state_dict(),
                   "Climb(objective='max_entropy', lr=0.05, penalty=20.0), but got one of the "
                   "default rule with focus=1; build"),
    "objective": (dict(rule="published", objective="calibration"),
                  lambda: whole(rule="published").state_dict(),
                  "but got one of the published rule for max_entropy; build the criterion with"),
    "version 0.1": (dict(), without("setting"),
                    LEVELS + "be of version 0.3 or later, but got one of another version; train "
                    "anew"),
    "another setting": (dict(), spoilt(setting=torch.zeros(1)), "be of version 0.3 or later, but"),
    "one level": (dict(), spoilt(alpha=torch.tensor(0.1)), LEVELS + "have 6 levels, but got 1; "),
    "other counts": (dict(), spoilt(counts=torch.zeros(3)),
                     "`counts` to be of shape (2, 3) in the saved state, but got of shape (3,); "),
    "version 0.2": (dict(), spoilt(climbs=torch.tensor(True)), "be of version 0.3 or later, but"),
    "labels": (dict(num_labels=None), lambda: whole().state_dict(),
               "Expected argument `counts` to be of shape (2, 1) in the saved state, but got of "
               "shape (2, 3); save and load with the same arguments"),
    "strength": (dict(half, beta=2.0),
                 lambda: put(whole(**half), alpha=0.8).state_dict(),
                 LEVELS + "hold levels in [0, 0.49], the cap at beta=2, but got one of 0.8; build "
                 "the criterion with the beta and prior that it was trained with"),
    "prior": (dict(half, prior=0.1), lambda: put(whole(**half), alpha=0.6).state_dict(),
              "levels in [0, 0.5456], the cap at beta=1, but got one of 0.6; "),
    "observed prior": (dict(), spoilt(alpha=torch.full((6,), 0.97), counts=torch.tensor(
        [[9.0, 9, 9], [0, 4, 0]])),
        "levels in [0, 0.5163], the cap at beta=1, but got one of 0.97; "),
    "negative": (dict(), spoilt(alpha=torch.tensor([0.1, -0.1, 0, 0, 0, 0])), "got one of -0.1"),
    "nan": (dict(), spoilt(alpha=torch.full((6,), math.nan)), "but got one of nan; "),
    "scalar": (dict(), spoilt(mean_level=torch.zeros(3)),
               "`mean_level` to be of shape () in the saved state, but got of shape (3,); "),
    "rows of visits": (dict(), spoilt(visited=torch.zeros(1, dtype=torch.uint8)),
                       "`visited` to be of shape (6,) in the saved state, but got of shape (1,); "),
    "weights": (dict(pos_weight=torch.ones(3)),
                lambda: whole(pos_weight=torch.full((1,), 2.0)).state_dict(),
                "size mismatch for pos_weight"),
    "rows and weights": (dict(pos_weight=torch.ones(3)),
                         lambda: whole(9, pos_weight=torch.full((3,), 2.0)).state_dict(),
                         LEVELS + "have 6 levels, but got 9; "),
    "generator": (dict(), spoilt(generator=torch.zeros(16, dtype=torch.uint8)),
                  "`generator` to be of shape (5072,) in the saved state, but got of shape (16,); "
                  "save and load with the same arguments, on the same type of device"),
}  # fmt: skip


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", REFUSED)
def test_a_state_of_another_table_is_refused_whole(name, strict, assign):
    options, source, text = REFUSED[name]
    criterion = fresh(**options)
    before, weights = saved(criterion), criterion.pos_weight
    state = source()
    with pytest.raises(RuntimeError, match=r"Error\(s\) in loading state_dict") as caught:
        criterion.load_state_dict(state, strict=strict, assign=assign)
    assert text in str(caught.value)
    assert str(caught.value).count("\n\t") == 1  # one sentence
    assert_same(criterion, before)
    assert criterion.pos_weight is weights  # which may be another module's too
    assert torch.equal(criterion.generator.get_state(), generator(0).get_state())
    trained(criterion).step(Measured())


def test_a_refusal_names_the_module_within_a_model_and_spares_the_table():
    model = nn.ModuleDict({"net": nn.Linear(2, 2), "criterion": fresh()})
    other = nn.ModuleDict({"net": nn.Linear(2, 2), "criterion": whole(9)})
    before = saved(model["criterion"])
    with pytest.raises(RuntimeError, match="have 6 levels, but got 9; build"):
        model.load_state_dict(other.state_dict())
    assert_same(model["criterion"], before)


def test_levels_at_the_cap_load():
    for options in (dict(beta=2.0, prior=0.5), dict(beta=1.3, prior=0.3), dict(num_labels=3),
                    dict(beta=1.0, prior=torch.tensor([0.02, 0.3, 0.7]))):  # fmt: skip
        options = {**WHOLE, "num_labels": None, "level": 1.0, **options}
        source = build(4, **options)
        trained(source, labels=3).step(Measured())
        assert (source.alpha == source.alpha.max()).sum() > 1  # some are
        other = build(4, **options)
        other.load_state_dict(source.state_dict())
        assert torch.equal(other.alpha, source.alpha)


# -- the meta device


def built_on_meta(rule="slope"):
    with torch.device("meta"):
        criterion = made(6, rule)
    assert criterion.alpha.is_meta
    return criterion


@both
@pytest.mark.parametrize("emptied", [False, True])
@pytest.mark.parametrize("assign", [False, True])
def test_built_on_meta_and_loaded(emptied, assign, rule):
    source = whole(rule=rule)
    state = {name: value for name, value in saved(source).items() if name != "generator"}
    criterion = built_on_meta(rule)
    if emptied:
        criterion.to_empty(device="cpu")
    criterion.load_state_dict(state, assign=assign)
    criterion.generator = copy.deepcopy(source.generator)
    assert_same(criterion, saved(source))
    trained(criterion, seed=2).step(Measured())
    trained(source, seed=2).step(Measured())
    assert_same(criterion, saved(source))


def test_built_on_meta_emptied_and_reset():
    criterion = built_on_meta().to_empty(device="cpu")
    criterion.alpha.fill_(math.nan)  # whatever lay in memory
    criterion.reset_parameters()
    assert_same(criterion, saved(made()))
    assert ", warming up 0/1)" in repr(criterion)
    twin = made()
    for one in (criterion, twin):
        torch.manual_seed(1)
        trained(one).step(Measured())
        trained(one)
    assert_same(criterion, saved(twin))


def test_reset_starts_again():
    criterion = whole(prior=0.3)
    criterion.reset_parameters()
    assert_same(criterion, saved(fresh(prior=0.3)), but=["generator"])
    assert ", warming up 0/1)" in repr(criterion)


# -- exact resume


class Training:
    """A small network and its loss, batch by batch."""

    def __init__(self, rank=0, model_seed=0, rule="slope", **options):
        torch.manual_seed(model_seed)
        self.net = nn.Linear(4, 3)
        self.criterion = made(10, rule, generator=generator(7 + rank), **options)
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
        self.criterion.step(Measured(0.7 + 0.01 * epoch, 0.6 + 0.05 * epoch))

    def result(self):
        return self.losses[-6:], {k: v.clone() for k, v in self.model.state_dict().items()}


def alone(rank, world, mode, path, options, stop):
    training = Training(model_seed=int(mode == "resume"), **options)
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


PAPER = dict(rule="published")


@pytest.mark.parametrize(
    ("options", "stop"),
    [(dict(), 2), (dict(), 15), (dict(prior="level_weighted"), 13), (dict(warmup=3), 13),
     (PAPER, 17), (PAPER | dict(objective="calibration"), 15)],
)  # fmt: skip
def test_resume_in_another_process_is_exact(tmp_path, options, stop):
    """Within an epoch, after a step, and in the warm-up."""
    path = str(tmp_path / "c.pt")
    alone(0, 1, "stop", path, options, stop)
    (straight,) = run(1, alone, "straight", path, options, stop)
    (resumed,) = run(1, alone, "resume", path, options, stop)
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


# -- torch.distributed.checkpoint


ROWS = 32


class Model(nn.Module):
    def __init__(self, seed=0, **options):
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
        self.criterion = made(ROWS, **{"pos_weight": torch.ones(3), **options})

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
    criterion.step(Measured())
    model(*batch(10 * rank + 2)).backward()
    if step:
        criterion.step(Measured())
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
@pytest.mark.parametrize(("before", "after"), [(2, 2), (1, 2)])
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
    model = Model()
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=path)
    messages = []
    for focus in (2.0, 3.0):
        other = Model(focus=focus)
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
    text = (
        "Expected the saved levels to be of the rule FollowSlope(level=0.2, focus={}), but got one "
        "of the default rule with focus=1; build the criterion with that rule"
    )
    texts = [text.format(focus) for focus in (2.0, 3.0)]
    assert run(2, dcp_refused, str(tmp_path)) == [texts] * 2


# -- FSDP2


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


# -- DistributedDataParallel


def ddp(rank, world, inside, rule):
    """Two batches per step of the network, the first without synchronisation."""
    model = Model(sampling="expected", rule=rule)
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
    criterion.step(Measured())
    with wrapped.no_sync():
        loss(*batch(10 * rank + 2)).backward()
    loss(*batch(10 * rank + 3)).backward()
    within = saved(criterion)
    criterion.step(Measured())
    return within, saved(criterion)


@both
@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
def test_ddp_with_default_options_and_no_sync_leaves_each_ranks_table_alone(inside, rule):
    (first, one), (second, two) = run(2, ddp, inside, rule)
    column = "sample_accuracy" if rule == "slope" else "alpha"
    assert_same(one, two)
    rows = [set(torch.cat([batch(10 * r + n)[2] for n in (2, 3)]).tolist()) for r in (0, 1)]
    for state, own in zip((first, second), rows, strict=True):
        assert set((state["visited"] == 2).nonzero().flatten().tolist()) == own
    assert not torch.equal(first[column], second[column])
    assert first["elements"].sum() > 0
    assert one["elements"].sum() == 0
    for row in range(ROWS):
        movers = [
            s[column][row] for s, own in zip((first, second), rows, strict=True) if row in own
        ]
        if movers:
            assert_close(one[column][row], sum(movers) / len(movers))
