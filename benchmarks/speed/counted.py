"""What a step asks of an accelerator: kernels launched, bytes moved, bytes kept for backward.

    python -m benchmarks.speed.counted

Writes ``results/counted.json``. Tensors of torch's device "meta" have no values and take the
accelerator's branches, so the same is counted on every machine. These are counts and not times:
each call of ATen that computes something is one launch, and moves each of its tensors once.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.report import table, versions
from benchmarks.speed.measure import BASELINE, SEGMENTATION, Batch, Case, Loss, build

OUT = Path(__file__).parents[1] / "results" / "counted.json"
LOSSES = ("sample", "shared", "adaptive", "climbing")
HEAD = ("", "BCE", "fixed, drawn", "adaptive, one level", "adaptive", "published")
SHAPES = (SEGMENTATION, (64, 20), (8192,))  # of as many launches, which is asserted
SMALL = (4, 1, 64, 64)  # what is kept is counted on a CPU, whose sweep leaves this to torch
CASES = {
    "launches, float mask": Case("counted", SEGMENTATION, LOSSES),
    "launches, bool mask": Case("counted", SEGMENTATION, LOSSES, target="bool"),
    "launches, uint8 mask": Case("counted", SEGMENTATION, LOSSES, target="uint8"),
    "launches, uint8 mask, `ignore_index`": Case(
        "counted", SEGMENTATION, LOSSES, target="uint8", void=True
    ),
    "launches, bfloat16, bool mask": Case(
        "counted", SEGMENTATION, LOSSES, dtype="bfloat16", target="bool"
    ),
}
MOVED = "bytes an element, float mask"
KEPT = "kept for backward, bytes an element, bfloat16, bool mask"


class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Launches and bytes of whatever is called inside on tensors of the device "meta"."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launches = self.bytes = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name == "binary_cross_entropy_with_logits":
            with self:
                return bce(*args, **kwargs)
        result = func(*args, **kwargs)
        written = _there(result)
        if written and not _is_free(func, name):
            read = [] if _fills(name) else _there((args, kwargs))
            self.launches += 1
            self.bytes += sum(_bytes(tensor) for tensor in read + written)
        return result


def bce(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    reduction: int = 1,
) -> Tensor:
    """torch's own, which is one call to whoever listens, as the calls that it makes inside."""
    assert pos_weight is None
    loss = torch.ones_like(target).sub_(target).mul_(input).sub_(F.logsigmoid(input))
    loss = loss if weight is None else loss.mul_(weight)
    return loss if reduction == 0 else loss.mean() if reduction == 1 else loss.sum()


def _there(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor) and t.is_meta and t.numel()]


def _is_free(func: Any, name: str) -> bool:
    """Whether nothing is computed: memory is allocated, or another view of it returned."""
    alias = [result.alias_info for result in func._schema.returns]
    view = any(one is not None and not one.is_write for one in alias)
    return view or name.startswith(("empty", "new_empty", "_unsafe_view"))


def _fills(name: str) -> bool:
    """Whether no tensor is read, though one may be passed."""
    return name.endswith("_like") or name.startswith("new_") or name in ("fill_", "zero_")


def _bytes(tensor: Tensor) -> int:
    """What it takes in memory: an expanded dimension is one value."""
    stored = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        stored *= size if stride else 1
    return stored * tensor.element_size()


# ---------------------------------------------------------------- a step


def batch(shape: tuple[int, ...], case: Case, device: str) -> Batch:
    kinds = {"float": getattr(torch, case.dtype), "bool": torch.bool, "uint8": torch.uint8}
    x = torch.zeros(shape, dtype=getattr(torch, case.dtype), device=device, requires_grad=True)
    return (
        x,
        torch.ones(shape, device=device, dtype=kinds[case.target]),
        torch.arange(shape[0], device=device),
    )


def loss_of(name: str, case: Case, device: str) -> Loss:
    """A loss past its warm-up."""
    loss = build(name, case)
    return loss.to(device) if isinstance(loss, nn.Module) else loss


def step(name: str, case: Case, shape: tuple[int, ...]) -> Counter:
    """Forward and backward."""
    loss, given = loss_of(name, case, "meta"), batch(shape, case, "meta")
    counter = Counter()
    with counter:
        loss(*given).backward()  # type: ignore[no-untyped-call]
    return counter


def kept(name: str, case: Case) -> float:
    """Bytes an element that the graph holds until backward, beside the logits and the mask."""
    loss, given = loss_of(name, case, "cpu"), batch(SMALL, case, "cpu")
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss(*given)
    theirs = {tensor.untyped_storage().data_ptr() for tensor in given}
    return sum(n for at, n in found.items() if at not in theirs) / given[0].numel()


def rows() -> Iterator[tuple[str, list[float]]]:
    """Title and figures, of torch's BCE first."""
    names = (BASELINE, *LOSSES)
    for title, case in CASES.items():
        yield title, [step(name, case, SEGMENTATION).launches for name in names]
    case = CASES["launches, float mask"]
    elements = torch.Size(SEGMENTATION).numel()
    yield MOVED, [round(step(name, case, SEGMENTATION).bytes / elements, 1) for name in names]
    case = CASES["launches, bfloat16, bool mask"]
    yield KEPT, [round(kept(name, case), 1) for name in names]


def shown(found: dict[str, list[float]]) -> str:
    """The table."""
    return table(HEAD, [[title, *(f"{n:g}" for n in row)] for title, row in found.items()])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(argv)
    found = dict(rows())
    args.out.write_text(json.dumps({"versions": versions("torch"), "rows": found}, indent=1) + "\n")
    print(shown(found))


if __name__ == "__main__":
    main()
