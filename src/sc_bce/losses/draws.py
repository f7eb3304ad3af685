"""The draws: which samples or elements are perturbed."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .._torch import readable

_BYTES_PAY_FROM = 1 << 15  # draws from which bytes are faster than uniform numbers
_DRAWS_PER_LEVEL = 1 << 4  # the same if each sample has its own level


def bernoulli(
    alpha: float | Tensor, input: Tensor, sampling: str, generator: torch.Generator | None
) -> Tensor:
    """Zeros and ones, 1 with probability alpha, one per sample (dimension 0) or per element.

    A tensor alpha holds one probability per sample.
    """
    shape = input.shape if sampling == "element" else input.shape[:1]
    if isinstance(alpha, Tensor) and alpha.dim() == 1:
        alpha = alpha.reshape(alpha.shape[0], *(1 for _ in shape[1:]))
    # Sizes come last: they would specialise a compiled graph.
    if not readable(input):
        return _uniform(input, shape, generator) < alpha
    fewest = _DRAWS_PER_LEVEL * alpha.numel() if isinstance(alpha, Tensor) else 0
    if shape.numel() < max(_BYTES_PAY_FROM, fewest):
        return _uniform(input, shape, generator).lt_(alpha)  # as floats: a bool takes longer
    return _by_bytes(alpha, input, shape, generator)


def materialized(alpha: Tensor) -> Tensor:
    """The same levels; inductor would otherwise look them up, or draw them, for each element."""
    flat = alpha.reshape(-1).float()
    place = torch.arange(flat.shape[0], device=flat.device)  # `len` would specialise the graph
    return torch.zeros_like(flat).index_copy(0, place, flat).reshape(alpha.shape)


def truncated_normal(input: Tensor, bound: float, generator: torch.Generator | None) -> Tensor:
    """A standard normal within [-bound, bound] for each element."""
    # By inverting the distribution function: rejection would need a data-dependent loop.
    reach = math.erf(bound / math.sqrt(2))
    uniform = _uniform(input, input.shape, generator)
    return math.sqrt(2) * torch.erfinv(reach * (2 * uniform - 1))


def _by_bytes(
    alpha: float | Tensor, input: Tensor, shape: torch.Size, generator: torch.Generator | None
) -> Tensor:
    # A CPU makes random numbers one by one, so one byte decides for an element. If it ties with
    # the first eight bits of alpha, a uniform number is compared with the remaining bits.
    count = shape.numel()
    words = torch.empty(-(-count // 8), dtype=torch.int64, device="cpu")
    words.random_(-(2**63), None, generator=generator)
    byte = words.view(torch.uint8)[:count].view(shape)
    level = torch.as_tensor(alpha, dtype=torch.float32, device="cpu") * 256
    first = level.floor().clamp(max=255)  # at alpha = 1 every tie is then drawn
    bits = first.to(torch.uint8)
    drawn = torch.empty(shape, dtype=torch.bool, device="cpu")
    torch.lt(byte, bits, out=drawn.view(torch.uint8))
    torch.eq(byte, bits, out=byte)
    words.view(torch.uint8)[count:] = 0
    found = words.nonzero()  # eight at a time
    within = words[found[:, 0]].view(torch.uint8).view(-1, 8) != 0
    ties = (8 * found + torch.arange(8, device="cpu"))[within]
    left = level - first
    if left.dim():
        left = left.reshape(-1)[ties // (count // left.numel())]
    drawn.view(-1)[ties] = _uniform(input, ties.shape, generator) < left
    return drawn


def _uniform(like: Tensor, shape: torch.Size, generator: torch.Generator | None) -> Tensor:
    # Always float32: a bfloat16 uniform has 256 values and would draw 0.001 as 0.004.
    # compile can't trace the keyword `generator` with a dynamic shape, not even as None.
    source: dict[str, Any] = {} if generator is None else {"generator": generator}
    if type(like) in (Tensor, nn.Parameter):
        return torch.rand(shape, device=like.device, dtype=torch.float32, **source)
    # A fake or distributed tensor creates one of its own kind.
    return like.detach().new_empty(shape, dtype=torch.float32).uniform_(**source)
