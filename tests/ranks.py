"""Gloo processes on this machine that several tests share: starting one costs seconds.

They are fed functions by name, so these stand in the test modules. Each call has a process group
of its own.
"""

import atexit
import multiprocessing
import os
import tempfile
import time
import traceback
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist


def connect(rank, world, store):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    # Older torch, of itself.
    warnings.filterwarnings("ignore", "TypedStorage is deprecated", module=r"torch\.distributed")
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world,
        timeout=timedelta(seconds=60),
    )  # fmt: skip


def leave():
    # Up to torch 2.6 the group's end can deadlock with a thread that still lets go of its last
    # work: let it.
    time.sleep(0.3)
    dist.destroy_process_group()


def _serve(pipe):
    while True:
        function, rank, world, store, arguments = pipe.recv()
        try:
            connect(rank, world, store)
            try:
                torch.manual_seed(rank)
                answer = True, function(rank, world, *arguments)
            finally:
                leave()
        except BaseException:  # a CheckpointException is no Exception
            answer = False, traceback.format_exc()
        pipe.send(answer)


class _Pool:
    def __init__(self):
        self._workers = []

    def worker(self, rank):
        while len(self._workers) <= rank:
            context = multiprocessing.get_context("spawn")
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there,), daemon=True)
            process.start()
            self._workers.append((process, here))
        return self._workers[rank][1]

    def stop(self):
        for process, _ in self._workers:
            process.terminate()
        self._workers = []


_POOL = _Pool()
atexit.register(_POOL.stop)


def run(world, function, *arguments):
    """What ``function(rank, world, *arguments)`` returned on each rank."""
    pipes = [_POOL.worker(rank) for rank in reversed(range(world))][::-1]
    with tempfile.TemporaryDirectory() as folder:
        for rank, pipe in enumerate(pipes):
            pipe.send((function, rank, world, f"{folder}/store", arguments))
        answers = []
        for rank, pipe in enumerate(pipes):
            if not pipe.poll(100):
                _POOL.stop()
                raise TimeoutError(f"rank {rank} of {world} does not answer")
            answers.append(pipe.recv())
    wrong = [f"rank {rank}: {text}" for rank, (right, text) in enumerate(answers) if not right]
    assert not wrong, "\n".join(wrong)
    return [value for _, value in answers]
