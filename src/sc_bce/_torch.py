"""What torch allows here and now: tensors that may be read, dtypes and calls that a device has."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import forward_ad

WITHOUT_FLOAT64 = ("mps",)
_OWN_KERNELS = ("cpu", "cuda", "meta")  # have every call; XLA lacks aminmax and views as bytes
UNREDUCIBLE = (torch.uint16, torch.uint32, torch.uint64)  # torch has no min and max for them


def any_set(mask: Tensor) -> bool | None:
    """Whether any element is set; None if reading it would wait or break a trace."""
    if mask.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    try:
        return bool(mask.any())
    except RuntimeError:  # vmap, fake and proxy tensors have no values to branch on
        return None


def readable(value: Tensor) -> bool:
    """Whether `value` is an ordinary CPU tensor whose data may be read and written now.

    Not if it is traced, compiled, vmapped or a subclass, nor if it is a tensor of inference mode,
    which autograd can't save.
    """
    return (
        not torch.compiler.is_compiling()
        and value.is_cpu
        and type(value) in (Tensor, nn.Parameter)
        and not value.is_inference()
        and not transformed()
    )


def transformed() -> bool:
    """Whether tracing, a functorch transform or a dispatch mode is active.

    Here and below are the only uses of torch's private names. Without them everything counts as
    transformed, which only costs speed.
    """
    return functional_transform() or getattr(torch._C, "_len_torch_dispatch_stack", object)() != 0


def functional_transform() -> bool:
    """The same without the modes, which an autograd.Function does not mind."""
    return tracing() or bool(getattr(torch._C, "_are_functorch_transforms_active", object)())


def tracing() -> bool:
    """Whether torch.jit, or its exporter of ONNX, records what runs here."""
    return getattr(torch._C, "_get_tracing_state", object)() is not None


def forward_mode() -> bool:
    """Whether forward-mode AD is on, for which our autograd.Functions have no formula."""
    return getattr(forward_ad, "_current_level", 0) >= 0


def has_values(value: Tensor) -> bool:
    """Whether the tensor has data: it is neither on the meta device nor fake."""
    return type(value) is Tensor and not value.is_meta


def as_bytes(mask: Tensor) -> Tensor:
    """The bytes of a bool tensor, as a view if the device has one.

    torch converts, compares and sums bytes many times faster than bools; inductor does not.
    """
    if mask.device.type in _OWN_KERNELS and not torch.compiler.is_compiling():
        return mask.view(torch.uint8)
    return mask.to(torch.uint8)


def kept(value: Tensor, mask: Tensor) -> Tensor:
    """The value where the mask is set and 0 elsewhere, even of nan."""
    if not value.is_floating_point():
        return value * mask
    if readable(value):  # a sixth of the time, if all of it is finite
        product = value * as_bytes(mask)
        if bool(product.sum().isfinite()):
            return product
    return torch.where(mask, value, 0.0)


def ends(value: Tensor) -> tuple[Tensor, Tensor]:
    """Minimum and maximum, in one pass unless that would move the tensor to the CPU and back."""
    if value.device.type in _OWN_KERNELS:
        low, high = value.aminmax()
        return low, high
    return value.min(), value.max()


def float64_device(device: torch.device) -> torch.device:
    """The device itself if it has float64, otherwise the CPU."""
    return torch.device("cpu") if device.type in WITHOUT_FLOAT64 else device


def on_backward(loss: Tensor, call: Callable[[], None]) -> Tensor:
    """The loss, with `call` run when a backward pass reaches it; eager code only."""
    if loss.requires_grad and not torch.compiler.is_compiling() and not transformed():
        loss.register_hook(lambda gradient: call())  # type: ignore[no-untyped-call]
    return loss


def world_size(group: dist.ProcessGroup | None = None) -> int:
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def rank(group: dist.ProcessGroup | None = None) -> int:
    return dist.get_rank(group) if world_size(group) > 1 else 0


def served(group: dist.ProcessGroup | None, own: torch.device) -> torch.device:
    """The device on which the group's backend accepts a tensor that is on ``own``."""
    devices = [pair.partition(":")[0] for pair in dist.get_backend_config(group).split(",")]
    if own.type in devices:
        return own
    return torch.device(devices[0], torch.accelerator.current_device_index())


def reduced(value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum over the processes."""
    if world_size(group) != 1:  # outside of the group, torch says so
        value = value.clone()
        dist.all_reduce(value, group=group)
    return value
