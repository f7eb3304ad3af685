"""Two and three gloo processes on this machine."""

import os
import time
import warnings
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from torch.utils.data import DistributedSampler

from sc_bce import AdaptivePerturbation

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
        self.criterion = AdaptivePerturbation(SAMPLES, **OPTIONS)

    def forward(self, x, y, index):
        # Logits detached from the parameters' updates, so that ranks can be compared exactly.
        return self.criterion(6 * x[:, :3] + 0 * self.net(x).sum(), y, index)


def connect(rank, world, store):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world,
        timeout=timedelta(seconds=60),
    )  # fmt: skip


def leave():
    # Up to torch 2.6 the group's end can deadlock with a thread that still lets go of its last
    # work: let it.
    time.sleep(0.3)
    dist.destroy_process_group()


def shares(world):
    """The sampler's split, without its padding: each sample belongs to one rank."""
    whole = list(range(SAMPLES))
    return [torch.tensor(whole[rank::world]) for rank in range(world)]


def train(rank, world, store, out, wrapped):
    connect(rank, world, store)
    x, y = data()
    if wrapped:
        model = DistributedDataParallel(Model())
        criterion = model.module.criterion
    else:
        criterion = AdaptivePerturbation(SAMPLES, **OPTIONS)
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
        torch.save(criterion.state_dict(), f"{out}/{rank}-{epoch}.pt")
    leave()


def single(world, wrapped):
    criterion = AdaptivePerturbation(SAMPLES, **OPTIONS)
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
def test_disjoint_ranks_end_with_the_table_of_one_process(tmp_path, world, wrapped):
    torch.multiprocessing.spawn(
        train, args=(world, tmp_path / "store", tmp_path, wrapped), nprocs=world
    )
    want = single(world, wrapped)
    assert (want["alpha"] > 0).sum() > 6
    for rank in range(world):
        got = torch.load(tmp_path / f"{rank}-3.pt", weights_only=True)
        assert list(got) == list(want)
        for name, value in want.items():
            assert torch.equal(got[name], value), (rank, name)


def overlap(rank, world, store, out):
    connect(rank, world, store)
    criterion = AdaptivePerturbation(4, sampling="expected", warmup=1)
    criterion.step(0.5)
    # The sampler's padding repeats sample 0 on every rank; sample 3 is met by none.
    index = torch.tensor([0, rank + 1]) if rank < 2 else torch.tensor([0])
    criterion(torch.full((len(index), 1), 3.0 + 3 * rank), torch.ones(len(index), 1), index)
    torch.save(criterion.alpha, f"{out}/before-{rank}.pt")
    criterion.step(0.5)
    torch.save(criterion.alpha, f"{out}/after-{rank}.pt")
    # Nothing moved since: a further merge changes nothing.
    criterion.step(0.5)
    assert torch.equal(criterion.alpha, torch.load(f"{out}/after-{rank}.pt"))
    leave()


@pytest.mark.parametrize("world", [2, 3])
def test_rows_moved_by_several_ranks_take_their_mean(tmp_path, world):
    torch.multiprocessing.spawn(overlap, args=(world, tmp_path / "store", tmp_path), nprocs=world)
    before = torch.stack([torch.load(tmp_path / f"before-{rank}.pt") for rank in range(world)])
    for rank in range(world):
        after = torch.load(tmp_path / f"after-{rank}.pt")
        assert_close(after[0], before[:, 0].mean())
        assert torch.equal(after[1:3], before.amax(0)[1:3])  # moved by one rank, 0 on the others
        assert after[3] == 0


def with_sampler(rank, world, store, out, stop):
    """Train on a padding sampler; `stop` saves each rank's checkpoint mid-epoch and resumes."""
    connect(rank, world, store)
    x, y = data()
    criterion = AdaptivePerturbation(SAMPLES, **OPTIONS)
    sampler = DistributedSampler(range(SAMPLES), world, rank, shuffle=True, seed=3)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        for number, batch in enumerate(torch.tensor(list(sampler)).split(2)):
            criterion(6 * x[batch, :3], y[batch], batch)
            if stop and (epoch, number) == (1, 1):
                torch.save(criterion.state_dict(), f"{out}/mid-{rank}.pt")
                criterion = AdaptivePerturbation(SAMPLES, **OPTIONS)
                criterion.load_state_dict(torch.load(f"{out}/mid-{rank}.pt", weights_only=True))
        criterion.step(0.8 + 0.01 * epoch, 0.95)
        if stop and epoch == 0:
            # After a step any rank's checkpoint will do.
            torch.save(criterion.state_dict(), f"{out}/step-{rank}.pt")
            dist.barrier()
            other = torch.load(f"{out}/step-{(rank + 1) % world}.pt", weights_only=True)
            criterion = AdaptivePerturbation(SAMPLES, **OPTIONS)
            criterion.load_state_dict(other)
    torch.save(criterion.state_dict(), f"{out}/end-{int(stop)}-{rank}.pt")
    leave()


def test_resume_from_any_rank_after_a_step_and_from_each_rank_mid_epoch(tmp_path):
    for stop in (False, True):
        torch.multiprocessing.spawn(
            with_sampler, args=(2, tmp_path / f"store-{stop}", tmp_path, stop), nprocs=2
        )
    ends = [
        torch.load(tmp_path / f"end-{stop}-{rank}.pt", weights_only=True)
        for stop in (0, 1)
        for rank in range(2)
    ]
    assert (ends[0]["alpha"] > 0).any()
    for end in ends[1:]:
        for name, value in ends[0].items():
            assert torch.equal(end[name], value), name


def drawing(rank, world, store, out, resumed):
    """Draws of each rank's own generator, before and after rank 1's checkpoint of the step."""
    connect(rank, world, store)
    x, y = data()

    def build():
        generator = torch.Generator().manual_seed(rank)
        return AdaptivePerturbation(SAMPLES, warmup=1, reduction="none", generator=generator)

    def epoch(criterion):
        criterion.alpha.fill_(0.4)
        return criterion(x[:, :3], y, torch.arange(SAMPLES)).detach()

    criterion = build()
    criterion.step(0.8)
    epoch(criterion)
    criterion.step(0.8)
    if resumed:
        if rank == 1:
            torch.save(criterion.state_dict(), f"{out}/one.pt")
        dist.barrier()
        criterion = build()
        criterion.load_state_dict(torch.load(f"{out}/one.pt", weights_only=True))
    torch.save(epoch(criterion), f"{out}/drawn-{int(resumed)}-{rank}.pt")
    leave()


def test_any_ranks_checkpoint_after_a_step_holds_every_ranks_generator(tmp_path):
    for resumed in (False, True):
        torch.multiprocessing.spawn(
            drawing, args=(3, tmp_path / f"store-{resumed}", tmp_path, resumed), nprocs=3
        )
    drawn = [[torch.load(tmp_path / f"drawn-{r}-{rank}.pt") for rank in range(3)] for r in (0, 1)]
    for straight, resumed in zip(*drawn, strict=True):
        assert torch.equal(straight, resumed)
    assert not torch.equal(drawn[1][0], drawn[1][1])


def one_dies(rank, store, out):
    connect(rank, 2, store)
    criterion = AdaptivePerturbation(4, sampling="expected", warmup=1)
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
