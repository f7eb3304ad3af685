"""What the index of `IndexedDataset` means behind the samplers and loaders of others.

    pip install accelerate datasets lightning timm torchdata torchvision
    python -m benchmarks.index_semantics

Eleven samples, whose input is their number, pass each loader for one epoch, as two processes see
them. The markdown table says whether an index always came with its own sample, which samples came
more than once or not at all, and which came again when the epoch was resumed after two batches.
What is not installed is left out. Not run in CI.
"""

from __future__ import annotations

import importlib
import logging
import os
import socket
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing as mp
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from sc_bce import IndexedDataset

SAMPLES, BATCH = 11, 2
DATA = TensorDataset(torch.arange(float(SAMPLES))[:, None], torch.arange(SAMPLES) % 2)
Row = tuple[
    str, str, str
]  # whether the index is stable, what comes not once, what a resume repeats


def read(loaders: Iterable[Iterable[Any]]) -> tuple[str, str]:
    """Whether each index came with its sample, and how often the samples came over all ranks."""
    counts: Counter[int] = Counter()
    stable = True
    for loader in loaders:
        for value, _, index in loader:
            stable &= bool((value.flatten() == index).all())
            counts.update(index.tolist())
    often = sorted(i for i in counts if counts[i] > 1)
    never = sorted(set(range(SAMPLES)) - set(counts))
    said = f"{often} come {max(counts.values())} times" if often else "each once"
    return "yes" if stable else "no", said + (f", {never} never" if never else "")


def resumed(loader: Callable[[], Any], stateful: bool = False) -> str:
    """What comes again if the rest of the epoch comes from a new loader of the same seed."""
    torch.manual_seed(0)
    first = loader()
    batches = iter(first)
    seen = [next(batches)[-1].tolist() for _ in range(2)]
    state = first.state_dict() if stateful else {}
    torch.manual_seed(1)
    second = loader()
    if stateful:
        second.load_state_dict(state)
    rest = [index for *_, part in second for index in part.tolist()]
    again = sorted(set(rest) & {index for part in seen for index in part})
    return f"{again} come again" if again else "none"


def shuffled(data: Any = DATA) -> DataLoader[Any]:
    return DataLoader(IndexedDataset(data), BATCH, shuffle=True)


def ranks(sampler: Callable[[Any, int], Any]) -> list[DataLoader[Any]]:
    data = IndexedDataset(DATA)
    return [DataLoader(data, BATCH, sampler=sampler(data, rank)) for rank in range(2)]


def in_processes(work: Callable[[Path], Any]) -> list[Any]:
    """What ``work`` returns on each of two processes of one group."""
    with tempfile.TemporaryDirectory() as folder:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        mp.start_processes(_process, (port, Path(folder), work), nprocs=2)  # type: ignore[no-untyped-call,attr-defined]
        return [torch.load(Path(folder, f"{rank}.pt")) for rank in range(2)]


def _process(rank: int, port: int, folder: Path, work: Callable[[Path], Any]) -> None:
    # As torchrun sets them.
    os.environ |= {
        "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2",
        "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none",
    }  # fmt: skip
    warnings.simplefilter("ignore")
    torch.save(work(folder), folder / f"{rank}.pt")


def distributed() -> Iterator[tuple[str, Row]]:
    for drop in (False, True):
        sampler = partial(DistributedSampler, drop_last=drop)
        loaders = ranks(lambda data, rank, make=sampler: make(data, 2, rank))  # type: ignore[misc]
        name = "DistributedSampler" + (", `drop_last=True`" if drop else "")
        yield (
            f"torch {version('torch')}: {name}",
            (*read(loaders), resumed(lambda one=loaders[0]: one)),  # type: ignore[misc]
        )
    yield f"torch {version('torch')}: DataLoader", (*read([shuffled()]), resumed(shuffled))


def accelerate() -> Iterator[tuple[str, Row]]:
    prepare = importlib.import_module("accelerate.data_loader").prepare_data_loader
    for option in (
        {},
        {"even_batches": False},
        {"split_batches": True},
        {"use_stateful_dataloader": True},
    ):

        def make(rank: int, option: dict[str, bool] = option) -> Any:
            loader = DataLoader(IndexedDataset(DATA), BATCH)
            return prepare(loader, num_processes=2, process_index=rank, **option)

        name = ", ".join(f"`{k}={v}`" for k, v in option.items()) or "default"
        row = (
            *read(make(rank) for rank in range(2)),
            resumed(lambda make=make: make(0), "use_stateful_dataloader" in option),  # type: ignore[misc]
        )
        yield f"accelerate {version('accelerate')}: {name}", row
    (first, again), (second, _) = in_processes(dispatched)
    yield f"accelerate {version('accelerate')}: `dispatch_batches=True`", (
        *read([first, second]), again,
    )  # fmt: skip


def dispatched(folder: Path) -> tuple[list[Any], str]:
    """What this process gets of the batches that the first one reads, and of a resumed epoch."""
    them = importlib.import_module("accelerate")
    config = them.utils.DataLoaderConfiguration(dispatch_batches=True)
    accelerator = them.Accelerator(cpu=True, dataloader_config=config)

    def make() -> Any:
        return accelerator.prepare(DataLoader(IndexedDataset(DATA), BATCH))

    return list(make()), resumed(make)


def lightning() -> Iterator[tuple[str, Row]]:
    importlib.import_module("lightning")
    (first, seen, rest), (second, *_) = in_processes(trained)
    whole, seen, rest = (
        sorted(int(i) for *_, part in one for i in part) for one in (first, seen, rest)
    )
    again = f"{sorted({*seen} & {*rest})} come again, {sorted({*whole} - {*seen, *rest})} never"
    row = (*read([first, second]), again)
    yield f"lightning {version('lightning')}: Trainer, two processes", row


def trained(folder: Path) -> list[list[Any]]:
    """The batches of this process in an epoch, the first two, and those of a resume after them."""
    them = importlib.import_module("lightning.pytorch")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Network(them.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)
            self.seen: list[Any] = []

        def training_step(self, batch: Any) -> Any:
            self.seen.append([part.clone() for part in batch])
            return self.layer(batch[0]).mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    def fit(path: Path | None = None) -> list[Any]:
        them.seed_everything(0, verbose=False)
        keep = them.callbacks.ModelCheckpoint(
            folder, "{step}", every_n_train_steps=2, save_top_k=-1
        )
        trainer = them.Trainer(
            accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, callbacks=keep,
            logger=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        network = Network()
        trainer.fit(network, shuffled(), ckpt_path=path)
        return network.seen

    whole = fit()
    return [whole, whole[:2], fit(folder / "step=2.ckpt")]


def datasets() -> Iterator[tuple[str, Row]]:
    them = importlib.import_module("datasets")
    them.disable_progress_bars()
    whole = them.Dataset.from_dict({"value": list(range(SAMPLES))})

    def pairs(data: Any) -> list[tuple[torch.Tensor, int]]:
        return [(torch.tensor([float(row["value"])]), 0) for row in data]

    for name, data in (
        ("`filter`", whole.filter(lambda row: row["value"] > 2)),
        ("`shuffle(seed=0)`", whole.shuffle(seed=0)),
    ):
        row = (*read([shuffled(pairs(data))]), resumed(lambda data=data: shuffled(pairs(data))))  # type: ignore[misc]
        yield f"datasets {version('datasets')}: {name} before IndexedDataset", row
    try:
        IndexedDataset(whole.to_iterable_dataset())
    except TypeError as error:
        refused = str(error).split(";")[0]
        yield f"datasets {version('datasets')}: IterableDataset", (f"refused: {refused}", "", "")


def torchdata() -> Iterator[tuple[str, Row]]:
    them = importlib.import_module("torchdata.stateful_dataloader").StatefulDataLoader

    def make() -> Any:
        return them(IndexedDataset(DATA), BATCH, shuffle=True)

    yield (
        f"torchdata {version('torchdata')}: StatefulDataLoader",
        (*read([make()]), resumed(make, True)),
    )


def timm() -> Iterator[tuple[str, Row]]:
    them = importlib.import_module("timm.data.distributed_sampler").RepeatAugSampler
    loaders = ranks(lambda data, rank: them(data, 2, rank, selected_round=0))
    row = (*read(loaders), resumed(lambda: loaders[0]))
    yield f"timm {version('timm')}: RepeatAugSampler(selected_round=0)", row


def torchvision() -> Iterator[tuple[str, Row]]:
    them = importlib.import_module("torchvision.transforms.v2").MixUp(num_classes=2)
    images, labels = torch.rand(4, 3, 2, 2), torch.tensor([0, 1, 1, 0])
    for names, batch in (
        ("(image, label, index)", (images, labels, torch.arange(4))),
        ("(image, index, label)", (images, torch.arange(4), labels)),
    ):
        try:
            out = them(batch)
            said = ", ".join(f"{tuple(part.shape)} {str(part.dtype)[6:]}" for part in out[1:])
            row = (f"after the image come {said}", "", "")
        except (TypeError, ValueError, RuntimeError) as error:
            row = (f"{type(error).__name__}: {str(error)[:80]}", "", "")
        yield f"torchvision {version('torchvision')}: MixUp of {names}", row


def main() -> None:
    warnings.simplefilter("ignore")
    print("| loader | index stays with its sample | in one epoch | in a resumed epoch |")
    print("|---|---|---|---|")
    for part in (distributed, accelerate, lightning, datasets, torchdata, timm, torchvision):
        torch.manual_seed(0)
        try:
            for name, row in part():
                print(f"| {name} | {' | '.join(row)} |", flush=True)
        except ImportError:
            continue


if __name__ == "__main__":
    main()
