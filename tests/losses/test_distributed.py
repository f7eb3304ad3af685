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
from tables import assert_same, build, saved
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from torch.utils.data import DistributedSampler

SAMPLES = 13  # so that the sampler pads, and the last batches are uneven
OPTIONS = dict(sampling="expected", warmup=1, focus=1.0, objective="feedback", lr=0.01)


def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SAMPLES, 4, generator=generator)
    return x, torch.randint(0, 2, (SAMPLES, 3), generator=generator)


class Model(nn.Module):
    """A network with a batch norm, whose buffers DDP does broadcast, and the loss inside."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
        self.criterion = build(SAMPLES, **OPTIONS)

    def forward(self, x, y, index):
        # Logits detached from the parameters' updates, so that ranks can be compared exactly.
        return self.criterion(6 * x[:, :3] + 0 * self.net(x).sum(), y, index)


def shares(world):
    """The sampler's split, without its padding: each sample belongs to one rank."""
    whole = list(range(SAMPLES))
    return [torch.tensor(whole[rank::world]) for rank in range(world)]


def train(rank, world, wrapped):
    x, y = data()
    if wrapped:
        model = DistributedDataParallel(Model())
        criterion = model.module.criterion
    else:
        criterion = build(SAMPLES, **OPTIONS)
    mine = shares(world)[rank]
    # DDP needs as many forwards on each rank; outside it the counts may differ.
    batches = list(mine.split(2))
    for epoch in range(4):
        for batch in batches[: SAMPLES // world // 2] if wrapped else batches:
            if wrapped:
                model(x[batch], y[batch], batch).backward()
            else:
                criterion(6 * x[batch, :3], y[batch], batch)
        criterion.step(0.8 + 0.01 * epoch, 0.95)
    return criterion.state_dict()


def single(world, wrapped):
    criterion = build(SAMPLES, **OPTIONS)
    x, y = data()
    for epoch in range(4):
        for mine in shares(world):
            batches = list(mine.split(2))
            for batch in batches[: SAMPLES // world // 2] if wrapped else batches:
                criterion(6 * x[batch, :3], y[batch], batch)
        criterion.step(0.8 + 0.01 * epoch, 0.95)
    return criterion.state_dict()


@pytest.mark.filterwarnings("ignore:AdaptivePerturbation has trained past its warm-up")
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("wrapped", [False, True], ids=["outside", "inside DDP"])
def test_disjoint_ranks_end_with_the_table_of_one_process(world, wrapped):
    want = single(world, wrapped)
    assert (want["alpha"] > 0).sum() > 6
    for got in run(world, train, wrapped):
        assert_same(got, want)


def overlap(rank, world):
    criterion = build(4, sampling="expected", warmup=1)
    criterion.step(0.5)
    # The sampler's padding repeats sample 0 on every rank; sample 3 is met by none.
    index = torch.tensor([0, rank + 1]) if rank < 2 else torch.tensor([0])
    criterion(torch.full((len(index), 1), 3.0 + 3 * rank), torch.ones(len(index), 1), index)
    before = criterion.alpha.clone()
    criterion.step(0.5)
    after = criterion.alpha.clone()
    # Nothing moved since: a further merge changes nothing.
    criterion.step(0.5)
    assert torch.equal(criterion.alpha, after)
    assert criterion.visited.tolist() == [1, 1, 1, 0]
    return before, after


@pytest.mark.parametrize("world", [2, 3])
def test_rows_moved_by_several_ranks_take_their_mean(world):
    tables = run(world, overlap)
    before = torch.stack([one for one, _ in tables])
    for _, after in tables:
        assert_close(after[0], before[:, 0].mean())
        assert torch.equal(after[1:3], before.amax(0)[1:3])  # moved by one rank, 0 on the others
        assert after[3] == 0


def batches(rank, epoch):
    """Five samples of the rank, some of them twice, some met by the other ranks too."""
    rng = np.random.default_rng(100 * epoch + rank)
    for _ in range(2):
        x = rng.normal(2, 5, (5, 2))
        yield rng.integers(0, 6, 5), x, rng.integers(0, 2, x.shape).astype(float)


def follow(rank, world, options):
    warnings.simplefilter("ignore")  # ten samples a rank and epoch, of seven
    criterion = build(7, **options)
    shown = []
    for epoch in range(4):
        for index, x, y in batches(rank, epoch):
            criterion(*(torch.from_numpy(one) for one in (x, y, index)))
        criterion.step(0.7 + 0.02 * epoch, 0.9)
        doubt, budget = float(criterion.doubt), float(criterion.epoch.budget)
        prior = torch.as_tensor(criterion.prior).tolist()
        shown.append((criterion.alpha.tolist(), doubt, budget, prior))
    return shown


FOLLOWED = {
    "feedback, one half": dict(objective="feedback", beta=0.8, focus=1.0),
    "calibration, observed": dict(beta=1.0, prior="observed", num_labels=2, penalty=20.0),
    "feedback, observed": dict(objective="feedback", beta=0.9, prior="observed", lr=0.05),
}


@pytest.mark.filterwarnings("ignore:since the last step the criterion saw")
@pytest.mark.parametrize("name", FOLLOWED)
def test_several_ranks_follow_the_reference(name):
    options = {"warmup": 1, "sampling": "expected", **FOLLOWED[name]}
    want = [ref.Table(7, **{k: v for k, v in options.items() if k != "sampling"}) for _ in "ab"]
    got = run(2, follow, options)
    for epoch in range(4):
        for rank in range(2):
            for index, x, y in batches(rank, epoch):
                want[rank].observe(index, x, y)
        ref.together(want, 0.7 + 0.02 * epoch, 0.9)
        for rank in range(2):
            alpha, doubt, budget, prior = got[rank][epoch]
            np.testing.assert_allclose(alpha, want[0].alpha, rtol=1e-4, atol=1e-5)
            assert doubt == pytest.approx(want[0].doubt, abs=1e-5)
            assert budget == pytest.approx(want[0].budget, abs=1e-5)
            np.testing.assert_allclose(prior, want[0].shown, atol=1e-6)
    assert max(got[0][3][0]) > 0.01


def with_sampler(rank, world, out, stop):
    """Train on a padding sampler; `stop` saves each rank's checkpoint mid-epoch and resumes."""
    x, y = data()
    criterion = build(SAMPLES, **OPTIONS)
    sampler = DistributedSampler(range(SAMPLES), world, rank, shuffle=True, seed=3)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        for number, batch in enumerate(torch.tensor(list(sampler)).split(2)):
            criterion(6 * x[batch, :3], y[batch], batch)
            if stop and (epoch, number) == (1, 1):
                torch.save(criterion.state_dict(), f"{out}/mid-{rank}.pt")
                criterion = build(SAMPLES, **OPTIONS)
                criterion.load_state_dict(torch.load(f"{out}/mid-{rank}.pt", weights_only=True))
        criterion.step(0.8 + 0.01 * epoch, 0.95)
        if stop and epoch == 0:
            # After a step any rank's checkpoint will do.
            torch.save(criterion.state_dict(), f"{out}/step-{rank}.pt")
            dist.barrier()
            other = torch.load(f"{out}/step-{(rank + 1) % world}.pt", weights_only=True)
            criterion = build(SAMPLES, **OPTIONS)
            criterion.load_state_dict(other)
    return criterion.state_dict()


def test_resume_from_any_rank_after_a_step_and_from_each_rank_mid_epoch(tmp_path):
    ends = [end for stop in (False, True) for end in run(2, with_sampler, str(tmp_path), stop)]
    assert (ends[0]["alpha"] > 0).any()
    for end in ends[1:]:
        assert_same(end, ends[0])


def drawing(rank, world, out, resumed):
    """Draws of each rank's own generator, before and after rank 1's checkpoint of the step."""
    x, y = data()

    def fresh():
        generator = torch.Generator().manual_seed(rank)
        return build(SAMPLES, warmup=1, reduction="none", generator=generator)

    def epoch(criterion):
        criterion.alpha.fill_(0.4)
        return criterion(x[:, :3], y, torch.arange(SAMPLES)).detach()

    criterion = fresh()
    criterion.step(0.8)
    epoch(criterion)
    criterion.step(0.8)
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
    criterion = build(4, objective="feedback", beta=1.0, prior=0.3, warmup=1)
    batch = torch.full((1, 1), 3.0), torch.ones(1, 1), torch.tensor([rank])
    criterion(*batch)
    criterion.step(0.9, 0.95)
    criterion(*batch)
    before = saved(criterion)
    given = {
        "nan on one": (float("nan") if rank == 1 else 0.9, 0.95),
        "a word on one": ("0.9" if rank == 1 else 0.9, 0.95),
        "a vector on one": (torch.ones(2) if rank == 0 else 0.9, 0.95),
        "no confidence on one": (0.9, None if rank == 1 else 0.95),
        "a failure on one": (Failing() if rank == 1 else 0.9, None if rank == 1 else 0.95),
        "other accuracy": (0.9 + 0.01 * rank, 0.95),
        "other confidence": (0.9, 0.95 + 0.01 * rank),
    }[kind]
    try:
        criterion.step(*given)
    except (TypeError, ValueError, RuntimeError) as error:
        told = type(error).__name__, str(error)
    else:
        told = None
    assert_same(criterion, before)
    # Within the tolerance all goes on, and the rows are merged as ever.
    criterion.step(0.9 + 1e-9 * rank, 0.95)
    return told, criterion.alpha.tolist()


class Failing:
    """A measure of the user's whose computation fails."""

    confidence = None

    def accuracy(self):
        raise RuntimeError("out of memory")


DISAGREEING = {
    "nan on one": ("ValueError", "`accuracy` to be in [0, 1], but got nan"),
    "a word on one": ("TypeError", "`accuracy` to be a number in [0, 1], but got '0.9' (str)"),
    "a vector on one": ("TypeError", "in [0, 1], but got a tensor of shape (2,); pass its mean"),
    "no confidence on one": ("ValueError", "`confidence` to be given for objective 'feedback'"),
    "a failure on one": ("RuntimeError", "out of memory"),
    "other accuracy": (
        "ValueError",
        "`accuracy` to be the same on every rank, but got [0.9, 0.91]; reduce it first, for "
        "example `histogram.all_reduce()`",
    ),
    "other confidence": ("ValueError", "`confidence` to be the same on every rank"),
}


@pytest.mark.parametrize("kind", DISAGREEING)
def test_every_rank_raises_the_same_and_nothing_changes(kind):
    (first, alpha), (second, twin) = run(2, disagreeing, kind)
    assert first == second
    assert first[0] == DISAGREEING[kind][0]
    assert DISAGREEING[kind][1] in first[1]
    assert alpha == twin
    assert min(alpha[:2]) > 0 == max(alpha[2:])


def in_a_group(rank, world):
    """Ranks 0 and 2 train together; rank 1 trains alone, with other values."""
    groups = [dist.new_group([0, 2]), dist.new_group([1])]
    group = groups[rank % 2]
    generator = torch.Generator().manual_seed(rank)
    criterion = build(4, warmup=1, beta=1.0, prior="observed", generator=generator)
    for _ in range(2):
        criterion.update(torch.full((1, 1), 2.0 + rank), torch.ones(1, 1), torch.tensor([rank]))
        criterion.step(0.9 - 0.1 * (rank % 2), group=group)
    return saved(criterion), torch.rand(1, generator=generator).item()


def test_step_merges_over_its_group_alone():
    (zero, first), (one, second), (two, third) = run(3, in_a_group)
    assert_same(zero, two, but=["generator"])
    assert (zero["alpha"] > 0).tolist() == [True, False, True, False]
    assert (one["alpha"] > 0).tolist() == [False, True, False, False]
    assert zero["counts"].tolist() == [[4], [4 << 20], [4]]
    assert one["counts"].tolist() == [[2], [2 << 20], [2]]
    assert float(one["accuracy"]) == pytest.approx(0.8)
    assert len({first, second, third}) == 3


def positions(rank, world, alone):
    """Three samples a rank, by their place in the dataset of six or in a batch of two."""
    criterion = build(6, warmup=1)
    criterion.step(0.9)
    index = torch.tensor([0, 1, 0]) if alone else torch.arange(3) + 3 * rank
    criterion(torch.zeros(3), torch.ones(3), index)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        criterion.step(0.9)
        criterion(torch.zeros(3), torch.ones(3), index)
        criterion.step(0.9)
    return [(str(one.message), os.path.basename(one.filename)) for one in caught]


def test_the_rows_of_all_ranks_count_before_an_index_is_called_a_position():
    assert run(2, positions, False) == [[], []]
    text = (
        "since the last step the criterion saw 6 samples but only 2 of its 6 rows; pass the index "
        "of each sample in the dataset, as IndexedDataset yields it, not its position in the batch"
    )
    assert run(2, positions, True) == [[(text, "test_distributed.py")]] * 2


def warned_within_ddp(rank, world):
    model = DistributedDataParallel(Model())
    x, y = data()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            for batch in shares(2)[0][:6].split(3):
                model(x[batch], y[batch], batch).backward()
    return [(os.path.basename(one.filename), str(one.message)[:60]) for one in caught]


def test_a_warning_through_ddp_names_the_line_of_the_model():
    text = "AdaptivePerturbation has trained past its warm-up, but step("[:60]
    assert run(2, warned_within_ddp) == [[("test_distributed.py", text)]] * 2


def one_dies(rank, store, out):
    connect(rank, 2, store)
    criterion = build(4, sampling="expected", warmup=1)
    criterion.step(0.5)
    criterion(torch.full((1, 1), 3.0), torch.ones(1, 1), torch.tensor([rank]))
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
