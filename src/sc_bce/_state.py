"""Tensors that travel with a module without being its buffers, and the state of a generator."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ._errors import sentence
from ._torch import rank, reduced, world_size

Module = TypeVar("Module", bound="Stateful")

_HEAD = 16  # bytes: a seed and a rank, in front of a generator's state


class Stateful(nn.Module):
    """A module with tensors that a registered buffer would not carry safely.

    DistributedDataParallel would overwrite a buffer at each forward, and ``half()`` would cast
    it. What :meth:`held` names moves with the module, keeps its dtype and is saved in its
    ``state_dict``. It is listed as a buffer if this very module is asked for its own, as FSDP2
    and torch.distributed.checkpoint do.
    """

    generator: torch.Generator | None = None

    @abstractmethod
    def held(self) -> dict[str, Tensor]:
        """Every such tensor, by name. The first one says where they are."""

    @abstractmethod
    def hold(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace some of them."""

    def refusal(self, saved: Mapping[str, Any]) -> str | None:
        """Why a saved state does not fit this module, in a sentence; None if it does."""
        return None

    def __getattr__(self, name: str) -> Any:
        # torch.distributed.checkpoint asks for each key of a state as an attribute.
        if name[:1] != "_" and name in (held := self.held()):
            return held[name]
        return super().__getattr__(name)

    def _apply(self: Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Module:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        moved = {}
        for name, tensor in self.held().items():
            new = fn(tensor)
            # Follow the device but not the dtype: bfloat16 would lose steps below 1/256.
            moved[name] = new if new.dtype == tensor.dtype else tensor.to(new.device)
        self.hold(moved)
        return self

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        yield from super().named_buffers(prefix, recurse, remove_duplicate)
        if not recurse:  # FSDP2 asks module by module, DistributedDataParallel recurses from a root
            for name, tensor in self._travelling().items():
                yield f"{prefix}.{name}" if prefix else name, tensor

    def _travelling(self) -> dict[str, Tensor]:
        held = dict(self.held())
        if self.generator is not None:
            held["generator"] = _packed(self.generator).to(next(iter(held.values())).device)
        return held

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in self._travelling().items():
            # A copy, so that what a tool loads into it in place goes through load_state_dict.
            destination[prefix + name] = tensor.clone()

    @torch.inference_mode(False)
    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        held, own = self._travelling(), self.held()
        buffers = {name: (v, v.clone()) for name, v in self._buffers.items() if v is not None}
        lists: tuple[list[str], list[str], list[str]] = ([], [], [])
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)
        missing, unexpected, problems = lists
        saved = {k[len(prefix) :]: v for k, v in state_dict.items() if k.startswith(prefix)}
        problem = self.refusal(saved) or _misfit(held, saved) or next(iter(problems), None)
        if problem is not None:  # as if nothing had been loaded, in one sentence
            self._buffers.update((name, v.copy_(copy)) for name, (v, copy) in buffers.items())
            error_msgs.append(problem)
            return
        missing_keys += missing + [prefix + name for name in held if name not in saved]
        unexpected_keys += [key for key in unexpected if key[len(prefix) :] not in held]
        # One device for all tensors: a broadcast delivers scalars on the CPU.
        first, assign = next(iter(own)), local_metadata.get("assign_to_params_buffers", False)
        like = saved.get(first, own[first]) if assign or own[first].is_meta else own[first]
        self.hold(
            {
                name: saved[name].detach().to(like.device, tensor.dtype, copy=True)
                for name, tensor in own.items()
                if name in saved
            }
        )
        if self.generator is not None and "generator" in saved:
            _unpack(saved["generator"].cpu(), self.generator)


def _misfit(held: Mapping[str, Tensor], saved: Mapping[str, Any]) -> str | None:
    """What is wrong with the shape of a saved tensor, in a sentence."""
    for name, tensor in held.items():
        got = getattr(saved.get(name), "shape", tensor.shape)
        if got != tensor.shape:
            wanted = f"be of shape {tuple(tensor.shape)} in the saved state"
            remedy = "save and load with the same arguments, on the same type of device"
            return sentence(name, wanted, f"of shape {tuple(got)}", remedy)
    return None


def reseed(
    generator: torch.Generator, device: torch.device, group: dist.ProcessGroup | None
) -> None:
    """Seed each process's generator anew, from the generator of rank 0.

    Right after it the checkpoint of one process restores all: seed and rank determine the state.
    """
    if world_size(group) > 1:
        seed = torch.randint(2**62, (), generator=generator, device=generator.device)
        seed = reduced(seed.to(device) * (rank(group) == 0), group)
        generator.manual_seed(int(seed) + rank(group))


def _packed(generator: torch.Generator) -> Tensor:
    """A generator's seed, rank and state in one tensor, whose size is the same on any world."""
    head = torch.tensor([generator.initial_seed(), rank()], dtype=torch.uint64, device="cpu")
    return torch.cat((head.view(torch.uint8), generator.get_state().cpu()))


def _unpack(saved: Tensor, generator: torch.Generator) -> None:
    """Restore a generator; on a rank other than the saved one, from the seed of this rank."""
    seed, served = (int(value) for value in saved[:_HEAD].clone().view(torch.uint64))
    if served == rank():
        # A copy, since set_state reads a view from the start of its storage.
        generator.set_state(saved[_HEAD:].clone())
    else:
        generator.manual_seed((seed - served + rank()) % 2**64)
