"""Two and three gloo processes on this machine."""

import os
import time
import warnings

import numpy as np
import pytest
import reference as ref
import torch
import torch.distributed as dist
from ranks import connect, run
from tables import Measured, assert_same, build, climbing, published, put, saved
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from torch.utils.data import DistributedSampler

SAMPLES = 13  # so that the sampler pads, and the last batches are uneven
RULES = {
    "slope": lambda **options: build(SAMPLES, focus=1.0, **options),
    "published": lambda **options: published(
        SAMPLES, warmup=1, beta=1.0, prior="observed", lr=0.01, **options
    ),
}
both = pytest.mark.parametrize("rule", RULES)


def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SAMPLES, 4, generator=generator)
    return x, torch.randint(0, 2, (SAMPLES, 3), generator=generator)


class Model(nn.Module):
    """A network with a batch norm, whose buffers DDP does broadcast, and the loss inside."""

    def __init__(self, rule="slope"):
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
        self.criterion = RULES[rule]()

    def forward(self, x, y, index):
        # Logits detached from the parameters' updates, so that ranks can be compared exactly.
        return self.criterion(6 * x[:, :3] + 0 * self.net(x).sum(), y, index)


def shares(world):
    """The sampler's split, without its padding: each sample belongs to one rank."""
    whole = list(range(SAMPLES))
    return [torch.tensor(whole[rank::world]) for rank in range(world)]


def train(rank, world, wrapped, rule):
    x, y = data()
    x.requires_grad_()
    if wrapped:
        model = DistributedDataParallel(Model(rule))
        criterion = model.module.criterion
    else:
        criterion = RULES[rule]()
    mine = shares(world)[rank]
    # DDP needs as many forwards on each rank; outside it the counts may differ.
    batches = list(mine.split(2))
    for epoch in range(4):
        for batch in batches[: SAMPLES // world // 2] if wrapped else batches:
            if wrapped:
                model(x[batch], y[batch], batch).backward()
            else:
                criterion(6 * x[batch, :3], y[batch], batch)
        criterion.step(Measured(0.8 + 0.01 * epoch, 0.5 + 0.2 * epoch))
    return criterion.state_dict()


def single(world, wrapped, rule):
    criterion = RULES[rule]()
    x, y = data()
    x.requires_grad_()
    for epoch in range(4):
        for mine in shares(world):
            batches = list(mine.split(2))
            for batch in batches[: SAMPLES // world // 2] if wrapped else batches:
                criterion(6 * x[batch, :3], y[batch], batch)
        criterion.step(Measured(0.8 + 0.01 * epoch, 0.5 + 0.2 * epoch))
    return criterion.state_dict()


@both
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("wrapped", [False, True], ids=["outside", "inside DDP"])
def test_disjoint_ranks_end_with_the_table_of_one_process(world, wrapped, rule):
    want = single(world, wrapped, rule)
    assert (want["alpha"] > 0).sum() > 6
    for got in run(world, train, wrapped, rule):
        assert_same(got, want)


def overlap(rank, world):
    criterion = climbing(4, accuracy=0.5)
    # The sampler's padding repeats sample 0 on every rank; sample 3 is met by none.
    index = torch.tensor([0, rank + 1]) if rank < 2 else torch.tensor([0])
    x = torch.full((len(index), 1), 3.0 + 3 * rank, requires_grad=True)
    criterion(x, torch.ones(len(index), 1), index)
    before = criterion.alpha.clone()
    criterion.step(0.5)
    after = saved(criterion)
    # Nothing was trained since, on any rank: a further step changes nothing.
    with pytest.warns(UserWarning, match="without a training batch since the last step"):
        criterion.step(0.5)
    assert_same(criterion, after)
    if rank == 0:  # and if a rank alone trains, the others step with it
        criterion(x, torch.ones(len(index), 1), index)
    criterion.step(0.6)
    assert int(criterion.state_dict()["steps"]) == int(after["steps"]) + 1
    return before, after["alpha"], after["visited"].tolist(), criterion.alpha


@pytest.mark.parametrize("world", [2, 3])
def test_rows_moved_by_several_ranks_take_their_mean(world):
    tables = run(world, overlap)
    before = torch.stack([one for one, *_ in tables])
    for _, after, visited, last in tables:
        assert_close(after[0], before[:, 0].mean())
        assert torch.equal(after[1:3], before.amax(0)[1:3])  # moved by one rank, 0 on the others
        assert after[3] == 0
        assert visited == [1, 1, 1, 0]
        assert torch.equal(last, tables[0][3])
        assert last[0] > after[0]


def batches(rank, epoch):
    """Five samples of the rank, some of them twice, some met by the other ranks too."""
    rng = np.random.default_rng(100 * epoch + rank)
    for _ in range(2):
        x = rng.normal(2, 5, (5, 2))
        yield rng.integers(0, 6, 5), x, rng.integers(0, 2, x.shape).astype(float)


def follow(rank, world, options):
    make = published if "objective" in options else build
    criterion = make(7, **options)
    warnings.filterwarnings("ignore", "AdaptivePerturbation has trained past")  # rows met by chance
    shown = []
    for epoch in range(4):
        for index, x, y in batches(rank, epoch):
            x, y, index = (torch.from_numpy(one) for one in (x, y, index))
            criterion(x.requires_grad_(), y, index)
        criterion.step(Measured(0.7 + 0.02 * epoch, 0.5 + 0.3 * epoch))
        prior = torch.as_tensor(criterion.prior).tolist()
        shown.append((criterion.alpha.tolist(), prior))
    return shown


FOLLOWED = {
    "slope, one half": dict(beta=1.6, prior=0.5, focus=1.0),
    "slope, observed": dict(num_labels=2),
    "slope, level-weighted": dict(prior="level_weighted", warmup=2),
    "calibration, observed": dict(
        objective="calibration", beta=1.0, prior="observed", num_labels=2, penalty=20.0, warmup=1
    ),
    "max entropy": dict(objective="max_entropy", lr=0.02, warmup=1),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_several_ranks_follow_the_reference(name):
    options = FOLLOWED[name]
    if "objective" in options:
        options = {"beta": 2.0, "prior": 0.5, **options}
    want = [ref.Table(7, **options) for _ in "ab"]
    got = run(2, follow, options)
    for epoch in range(4):
        for rank in range(2):
            for index, x, y in batches(rank, epoch):
                want[rank].observe(index, x, y)
        ref.together(want, 0.7 + 0.02 * epoch, 0.5 + 0.3 * epoch)
        for rank in range(2):
            alpha, prior = got[rank][epoch]
            np.testing.assert_allclose(alpha, want[0].alpha, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(prior, want[0].shown, atol=1e-5)
    assert max(got[0][3][0]) > 0.01


def with_sampler(rank, world, out, stop, rule):
    """Train on a padding sampler; `stop` saves each rank's checkpoint mid-epoch and resumes."""
    x, y = data()
    x.requires_grad_()
    criterion = RULES[rule]()
    sampler = DistributedSampler(range(SAMPLES), world, rank, shuffle=True, seed=3)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        for number, batch in enumerate(torch.tensor(list(sampler)).split(2)):
            criterion(6 * x[batch, :3], y[batch], batch)
            if stop and (epoch, number) == (1, 1):
                torch.save(criterion.state_dict(), f"{out}/mid-{rank}.pt")
                criterion = RULES[rule]()
                criterion.load_state_dict(torch.load(f"{out}/mid-{rank}.pt", weights_only=True))
        criterion.step(Measured(0.8 + 0.01 * epoch, 0.5 + 0.2 * epoch))
        if stop and epoch == 0:
            # After a step any rank's checkpoint will do.
            torch.save(criterion.state_dict(), f"{out}/step-{rank}.pt")
            dist.barrier()
            other = torch.load(f"{out}/step-{(rank + 1) % world}.pt", weights_only=True)
            criterion = RULES[rule]()
            criterion.load_state_dict(other)
    return criterion.state_dict()


@both
def test_resume_from_any_rank_after_a_step_and_from_each_rank_mid_epoch(tmp_path, rule):
    given = str(tmp_path)
    ends = [end for stop in (False, True) for end in run(2, with_sampler, given, stop, rule)]
    assert (ends[0]["alpha"] > 0).any()
    for end in ends[1:]:
        assert_same(end, ends[0])


def drawing(rank, world, out, resumed):
    """Draws of each rank's own generator, before and after rank 1's checkpoint of the step."""
    x, y = data()

    x.requires_grad_()

    def fresh():
        generator = torch.Generator().manual_seed(rank)
        options = dict(level=0.4, focus=0.0, prior=0.5, sampling="sample", reduction="none")
        return build(SAMPLES, generator=generator, **options)

    def epoch(criterion):
        return criterion(x[:, :3], y, torch.arange(SAMPLES)).detach()

    criterion = fresh()
    for _ in range(2):
        epoch(criterion)
        criterion.step(Measured(0.8, 1.0))
    if resumed:
        if rank == 1:
            torch.save(criterion.state_dict(), f"{out}/one.pt")
        dist.barrier()
        criterion = fresh()
        criterion.load_state_dict(torch.load(f"{out}/one.pt", weights_only=True))
    return epoch(criterion)


def test_any_ranks_checkpoint_after_a_step_holds_every_ranks_generator(tmp_path):
    drawn = [run(3, drawing, str(tmp_path), resumed) for resumed in (False, True)]
    for straight, resumed in zip(*drawn, strict=True):
        assert torch.equal(straight, resumed)
    assert not torch.equal(drawn[1][0], drawn[1][1])
    assert not torch.equal(drawn[1][0], drawn[1][2])


def disagreeing(rank, world, kind):
    number = "number" in kind
    criterion = climbing(4) if number else build(4, prior=0.3)
    batch = torch.full((1, 1), 3.0, requires_grad=True), torch.ones(1, 1), torch.tensor([rank])
    criterion(*batch)
    before = saved(criterion)
    given = {
        "nan on one, a number": float("nan") if rank == 1 else 0.9,
        "a word on one, a number": "0.9" if rank == 1 else 0.9,
        "a vector on one, a number": torch.ones(2) if rank == 0 else 0.9,
        "two errors, a number": "0.9" if rank == 1 else 1.5,
        "no slope on one": 0.9 if rank == 1 else Measured(),
        "a failure on one": Failing() if rank == 1 else Measured(),
        "other accuracy": Measured(0.9 + 0.01 * rank),
        "other slope": Measured(0.9, 0.9 + 0.01 * rank),
        "no slope could be fitted on one": Measured(0.9, float("nan") if rank else 0.9),
    }[kind]
    try:
        criterion.step(given)
    except (TypeError, ValueError, RuntimeError) as error:
        told = type(error).__name__, str(error)
    else:
        told = None
    assert_same(criterion, before)
    # Within the tolerance all goes on, and the rows are merged as ever.
    criterion.step(Measured(0.9, 0.7 + 1e-9 * rank))
    return told, criterion.alpha.tolist()


class Failing(Measured):
    """A measure of the user's whose computation fails."""

    def slope(self):
        raise RuntimeError("out of memory")


DISAGREEING = {
    "nan on one, a number": ("ValueError", "`accuracy` to be in [0, 1], but got nan"),
    "a word on one, a number": (
        "TypeError",
        "`accuracy` to be a number in [0, 1], but got '0.9' (str)",
    ),
    "a vector on one, a number": (
        "TypeError",
        "in [0, 1], but got a tensor of shape (2,); pass its mean",
    ),
    "two errors, a number": ("ValueError", "`accuracy` to be in [0, 1], but got 1.5"),
    "no slope on one": ("TypeError", "`measured` to have the methods `accuracy()` and `slope()`"),
    "a failure on one": ("ValueError", "RuntimeError('out of memory')"),
    "other accuracy": (
        "ValueError",
        "`accuracy` to be the same on every rank, but got [0.9, 0.91]; reduce it first, for "
        "example `histogram.all_reduce()`",
    ),
    "other slope": ("ValueError", "`slope` to be the same on every rank, but got [0.9, 0.91]"),
    "no slope could be fitted on one": ("ValueError", "`slope` to be the same on every rank"),
}


@pytest.mark.parametrize("kind", DISAGREEING)
def test_every_rank_raises_the_same_and_nothing_changes(kind):
    (first, alpha), (second, twin) = run(2, disagreeing, kind)
    assert first == second
    assert first[0] == DISAGREEING[kind][0]
    assert DISAGREEING[kind][1] in first[1]
    assert alpha == twin
    assert min(alpha[:2]) > 0


def in_a_group(rank, world):
    """Ranks 0 and 2 train together; rank 1 trains alone, with other values."""
    groups = [dist.new_group([0, 2]), dist.new_group([1])]
    group = groups[rank % 2]
    generator = torch.Generator().manual_seed(rank)
    criterion = climbing(4, beta=1.0, prior="observed", generator=generator)
    put(criterion, counts=[[1.0], [0.5]])
    for _ in range(2):
        criterion.update(torch.full((1, 1), 2.0 + rank), torch.ones(1, 1), torch.tensor([rank]))
        criterion.step(0.9 - 0.1 * (rank % 2), group=group)
    return saved(criterion), torch.rand(1, generator=generator).item()


def test_step_merges_over_its_group_alone():
    (zero, first), (one, second), (two, third) = run(3, in_a_group)
    assert_same(zero, two, but=["generator"])
    assert (zero["alpha"] > 0).tolist() == [True, False, True, False]
    assert (one["alpha"] > 0).tolist() == [False, True, False, False]
    assert zero["counts"].tolist() == [[5], [4.5]]
    assert one["counts"].tolist() == [[3], [2.5]]
    assert float(one["accuracy"]) == pytest.approx(0.8)
    assert len({first, second, third}) == 3


def positions(rank, world, alone):
    """Three samples a rank, by their place in the dataset of six or in a batch of two."""
    criterion = build(6)
    index = torch.tensor([0, 1, 0]) if alone else torch.arange(3) + 3 * rank
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            for rows in index.split(2):
                x = torch.randn(len(rows), 5, requires_grad=True)
                criterion(x, torch.rand(len(rows), 5) > 0.5, rows)
            criterion.step(Measured())
    return [(str(one.message), os.path.basename(one.filename)) for one in caught]


def test_the_rows_of_all_ranks_count_before_an_index_is_called_a_position():
    assert run(2, positions, False) == [[], []]
    text = (
        "since the last step only the first rows of the criterion's table were trained; pass the "
        "index of each sample in the dataset, as IndexedDataset yields it, not its position in the "
        "batch"
    )
    assert run(2, positions, True) == [[(text, "test_distributed.py")] * 2] * 2


def warned_within_ddp(rank, world):
    model = DistributedDataParallel(Model())
    x, y = data()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(4):
            for batch in shares(2)[0][:6].split(3):
                model(x[batch], y[batch], batch).backward()
    return [(os.path.basename(one.filename), str(one.message)[:60]) for one in caught]


def test_a_warning_through_ddp_names_the_line_of_the_model():
    text = "AdaptivePerturbation has trained past its warm-up, but step("[:60]
    assert run(2, warned_within_ddp) == [[("test_distributed.py", text)]] * 2


def one_dies(rank, store, out):
    connect(rank, 2, store)
    criterion = climbing(4, accuracy=0.5)
    criterion(torch.full((1, 1), 3.0, requires_grad=True), torch.ones(1, 1), torch.tensor([rank]))
    torch.save(criterion.state_dict(), f"{out}/{rank}.pt")
    dist.barrier()
    if rank == 1:
        os._exit(0)
    time.sleep(1)
    with pytest.raises(RuntimeError):
        criterion.step(0.5)
    saved = torch.load(f"{out}/0.pt", weights_only=True)
    for name, value in criterion.state_dict().items():
        assert torch.equal(value, saved[name]), name
    os._exit(0)  # the group of a dead rank can't be closed


def test_a_rank_that_dies_leaves_the_others_table_whole(tmp_path):
    torch.multiprocessing.spawn(one_dies, args=(tmp_path / "store", tmp_path), nprocs=2)
    saved = torch.load(tmp_path / "0.pt", weights_only=True)
    assert_close(saved["alpha"], torch.tensor([0.006, 0, 0, 0]))
