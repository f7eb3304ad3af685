"""The device that the suites run on, and one that none of us has: without float64, on the CPU."""

import re

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])


def lacks(last, what):
    """Marks what a torch up to this one does not have."""
    return pytest.mark.skipif(last >= TORCH, reason=f"torch {last[0]}.{last[1]} {what}")


# -- the device that the suites run on: torch's default one, as conftest sets it


def tensor(array):
    """A NumPy array on the device."""
    return torch.from_numpy(np.asarray(array)).to(torch.get_default_device())


def array(tensor):
    """A tensor of the device as NumPy's."""
    return tensor.detach().cpu().numpy()


def seeded(seed):
    """A generator of the device."""
    device = torch.get_default_device()
    if device.type == "xla":
        pytest.skip("XLA has no generators but its own")
    return torch.Generator(device).manual_seed(seed)


def rng_state():
    """What the global generator of the device draws next from."""
    device = torch.get_default_device()
    if device.type == "cpu":
        return torch.get_rng_state()
    if device.type == "xla":
        import torch_xla

        return torch.tensor(torch_xla.core.xla_model.get_rng_state(), device="cpu")
    return getattr(torch, device.type).get_rng_state()


def random(draw, generator, *size):
    """Numbers of a CPU's generator, on the device: the same on each."""
    return draw(*size, generator=generator, device="cpu").to(torch.get_default_device())


def refused(kind, text, call, values="the value|mask > 0"):
    """A refusal; of a value only on a CPU. Elsewhere none is looked at: the answer is returned."""
    if re.search(values, text) and torch.get_default_device().type != "cpu":
        return call()
    with pytest.raises(kind, match=text):
        call()
    return None


# -- a device without float64


DEVICE = torch.device("lazy", 0)  # which backward needs no driver for
_COPY, _MOVE = torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default
_READ = torch.ops.aten._local_scalar_dense.default


class Far(torch.Tensor):
    """A tensor that says it lies on the device, around the CPU's one that it is."""

    near: torch.Tensor

    @staticmethod
    def __new__(cls, near):
        if near.dtype == torch.float64:
            raise TypeError("the device has no float64")
        far = torch.Tensor._make_wrapper_subclass(
            cls, near.shape, strides=near.stride(), storage_offset=near.storage_offset(),
            dtype=near.dtype, device=DEVICE,
        )  # fmt: skip
        far.near = near
        return far

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError("to be used inside NoFloat64")


class NoFloat64(TorchDispatchMode):
    """While it lasts the device is there; it counts how often the CPU waits for it."""

    waits = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        far = [value for value in tensors if isinstance(value, Far)]
        there = bool(far)
        if kwargs.get("device") is not None:
            there = torch.device(kwargs["device"]).type == DEVICE.type
            kwargs["device"] = torch.device("cpu")
        elif function is _COPY:
            there = isinstance(args[0], Far)
        elif there and any(value.dim() for value in tensors if not isinstance(value, Far)):
            raise RuntimeError(f"{function} got tensors of two devices")
        if there and kwargs.get("dtype") == torch.float64:
            raise TypeError("the device has no float64")
        self.waits += function is _READ and there
        self.waits += function in (_COPY, _MOVE) and bool(far) and not there
        with _disable_current_modes():
            answer = function(*tree_map(_near, args), **tree_map(_near, kwargs))
        came = {id(value.near): value for value in far}

        def back(value):
            if id(value) in came:  # written in place
                return came[id(value)]
            return Far(value) if there and isinstance(value, torch.Tensor) else value

        return tree_map(back, answer)


class Moved(TorchFunctionMode):
    """Sends what is made of numbers on its way; a dispatch mode does not see it."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        made = function in (torch.tensor, torch.as_tensor) and not isinstance(args[0], Far)
        if made and kwargs.get("device") == DEVICE:
            return function(*args, **{**kwargs, "device": "cpu"}).to(DEVICE)
        if function is torch.Tensor.tolist and isinstance(args[0], Far):
            return args[0].cpu().tolist()
        if function is torch.Tensor.new_tensor and isinstance(args[0], Far):
            return torch.tensor(args[1], dtype=args[0].dtype).to(DEVICE)
        return function(*args, **kwargs)


def _near(value):
    return value.near if isinstance(value, Far) else value
