"""The dataset wrapper that yields the index of each sample."""

from __future__ import annotations

import copy
import keyword
import operator
from collections import namedtuple
from collections.abc import Collection, Mapping, MutableMapping, Sequence
from functools import cache
from typing import Any, SupportsIndex

from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset

from ._errors import describe, refuse

__all__ = ["IndexedDataset"]


class IndexedDataset(Dataset[Any]):
    """Wrap a map-style dataset so that it also yields the index of each sample.

    The index is the sample's position in the wrapped dataset. It does not depend on the order,
    the sampler, the workers or a ``Subset`` around this dataset, so that
    :class:`AdaptivePerturbation` finds the level of the sample again.

    A tuple or list gets the index appended, a namedtuple gets a field and a mapping an entry
    named ``key``. Any other item becomes ``(item, index)``. A namedtuple becomes one of another
    class, without methods of its own. What loaders ask of a dataset that has an epoch or a state,
    ``set_epoch``, ``state_dict`` and ``load_state_dict``, are those of the wrapped one if it has
    them.

    Args:
        dataset: an object with ``__getitem__`` and ``__len__``. To join datasets, wrap their
            ``ConcatDataset`` as a whole: wrapped parts would each count from 0.
        key: name of the index in mappings and namedtuples. Default: ``"index"``.

    Raises:
        TypeError: the dataset is iterable-style, so its samples have no index; it yields an index
            already; an index is not an int.
        ValueError: an item already has an entry of that name.
        IndexError: an index is out of range.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from sc_bce import IndexedDataset
        >>> dataset = IndexedDataset(TensorDataset(torch.rand(3, 2), torch.tensor([0, 1, 1])))
        >>> for input, target, index in DataLoader(dataset, batch_size=2):
        ...     print(target, index)
        tensor([0, 1]) tensor([0, 1])
        tensor([1]) tensor([2])
    """

    def __init__(self, dataset: Any, key: str = "index") -> None:
        _require_map_style(dataset)
        self.dataset = dataset
        self.key = key
        # On the instance, so that `hasattr` and a protocol's `isinstance` tell the truth.
        for name in ("set_epoch", "state_dict", "load_state_dict"):
            if hasattr(dataset, name):
                setattr(self, name, getattr(dataset, name))

    def __len__(self) -> int:
        return len(self.dataset)

    def __add__(self, other: Any) -> Any:
        raise TypeError(
            "An IndexedDataset can't be added to a dataset, since each would count from 0; wrap "
            "the sum, `IndexedDataset(one + other)`"
        )

    def __getitem__(self, index: int) -> Any:
        index = _as_position(index, len(self.dataset))
        return self._join(self.dataset[index], index)

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Fetch a batch, at once if the wrapped dataset can; DataLoader calls this."""
        dataset, size = self.dataset, len(self.dataset)
        indices = [_as_position(index, size) for index in indices]
        fetch = getattr(dataset, "__getitems__", None)
        items = fetch(indices) if fetch else [dataset[index] for index in indices]
        if not isinstance(items, (list, tuple)) or len(items) != len(indices):
            raise TypeError(
                f"Expected the dataset's `__getitems__` to return a list of {len(indices)} items, "
                f"but got {describe(items)}; a dataset of columns has no item to add an index to"
            )
        return list(map(self._join, items, indices))

    def _join(self, item: Any, index: int) -> Any:
        if isinstance(item, tuple) and hasattr(item, "_fields"):
            _require_new_key(self.key, item._fields, field=True)
            return _with_index(type(item), self.key)(*item, index)
        if type(item) is list:
            return [*item, index]
        if isinstance(item, (tuple, list)):
            return (*item, index)
        if isinstance(item, Mapping):
            _require_new_key(self.key, item)
            if type(item) is dict or not isinstance(item, MutableMapping):
                return {**item, self.key: index}
            item = copy.copy(item)  # the dataset may keep the original
            item[self.key] = index
            return item
        return (item, index)


@cache
def _with_index(base: type, key: str) -> type:
    """`base` with one more field. Made at run time, it is pickled as `base`, the key and values."""

    def reduce(self: tuple[Any, ...]) -> tuple[Any, ...]:
        return (_rebuild, (base, key, tuple(self)))

    fields = (*base._fields, key)  # type: ignore[attr-defined]
    longer = namedtuple(base.__name__, fields, rename=True)  # type: ignore[misc]  # as base may be
    return type(base.__name__, (longer,), {"__slots__": (), "__reduce__": reduce})


def _rebuild(base: type, key: str, values: tuple[Any, ...]) -> Any:
    return _with_index(base, key)(*values)


def _as_position(index: object, size: int) -> int:
    """The index as a position in the dataset; a negative one counts from the end."""
    if type(index) is int and 0 <= index < size:  # as samplers draw it: the rest takes far longer
        return index
    if not isinstance(index, SupportsIndex):
        remedy = "a sampler of batches belongs into DataLoader's `batch_sampler`"
        refuse("index", "be an int", describe(index), remedy, TypeError)
    place = operator.index(index)
    if not -size <= place < size:
        refuse("index", f"be in [{-size}, {size - 1}]", place, error=IndexError)
    return place % size


def _require_map_style(dataset: object) -> None:
    if _is_indexed(dataset):
        got, remedy = "an IndexedDataset, which yields its index already", "pass it on as it is"
        if not isinstance(dataset, IndexedDataset):
            got = f"a {type(dataset).__name__} of {got}"
            remedy = "build that of the datasets inside, and wrap it as a whole"
        refuse("dataset", "yield no index yet", got, remedy, TypeError)
    complete = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    if not complete or isinstance(dataset, (IterableDataset, type)):
        wanted = "be a map-style dataset, with __getitem__ and __len__"
        remedy = "samples of a stream have no index: use AdaptivePerturbation(num_samples=None)"
        refuse("dataset", wanted, describe(dataset), remedy, TypeError)


def _is_indexed(dataset: object) -> bool:
    """Whether the dataset is an IndexedDataset, or one is inside torch's own wrappers."""
    if isinstance(dataset, ConcatDataset):
        return any(_is_indexed(part) for part in dataset.datasets)
    if isinstance(dataset, Subset):
        return _is_indexed(dataset.dataset)
    return isinstance(dataset, IndexedDataset)


def _require_new_key(key: str, names: Collection[str], field: bool = False) -> None:
    if field and (not key.isidentifier() or keyword.iskeyword(key) or key.startswith("_")):
        remedy = "choose an identifier without a leading underscore"
        refuse("key", "be a field name of the items' namedtuple", repr(key), remedy)
    if key in names:
        refuse("key", "be a new name in the items", f"{key!r}, which is there already")
