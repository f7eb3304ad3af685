import copy
import inspect
import pickle
from collections import OrderedDict, namedtuple
from types import MappingProxyType

import numpy as np
import pytest
import torch
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Subset,
    TensorDataset,
    random_split,
)

from sc_bce import AdaptivePerturbation, IndexedDataset

Pair = namedtuple("Pair", ["image", "mask"])
ITEMS = {
    "tuple": lambda i: (torch.tensor(float(i)), i % 2),
    "list": lambda i: [torch.tensor(float(i)), i % 2],
    "dict": lambda i: {"image": torch.tensor(float(i)), "mask": i % 2},
    "ordered": lambda i: OrderedDict(image=torch.tensor(float(i)), mask=i % 2),
    "namedtuple": lambda i: Pair(torch.tensor(float(i)), i % 2),
    "tensor": lambda i: torch.tensor(float(i)),
}


class Numbers:
    """Item i holds the number i, in one of the forms of ITEMS."""

    def __init__(self, form, size=10):
        self.form, self.size = form, size

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        return ITEMS[self.form](i)


def image_and_index(form, batch):
    if form in ("dict", "ordered"):
        return batch["image"], batch["index"]
    if form == "namedtuple":
        return batch.image, batch.index
    return batch[0], batch[-1]


@pytest.mark.parametrize("form", ITEMS)
@pytest.mark.parametrize("workers", [0, 2])
def test_index_stays_with_the_sample_through_shuffling_and_workers(form, workers):
    loader = DataLoader(
        IndexedDataset(Numbers(form)), batch_size=3, shuffle=True, num_workers=workers
    )
    seen = []
    for batch in loader:
        image, index = image_and_index(form, batch)
        assert torch.equal(image.long(), index)
        assert index.dtype == torch.int64
        seen += index.tolist()
    assert sorted(seen) == list(range(10))


def test_items_keep_their_type():
    assert IndexedDataset(Numbers("list"))[3] == [torch.tensor(3.0), 1, 3]
    assert type(IndexedDataset(Numbers("ordered"))[3]) is OrderedDict
    item = IndexedDataset(Numbers("namedtuple"), key="row")[3]
    assert (item.image, item.mask, item.row) == (torch.tensor(3.0), 1, 3)
    assert item._fields == ("image", "mask", "row")


def test_with_replacement_and_through_subset_and_concatenation():
    indexed = IndexedDataset(Numbers("tuple"))
    for image, _, index in DataLoader(
        indexed, sampler=RandomSampler(indexed, replacement=True, num_samples=30), batch_size=4
    ):
        assert torch.equal(image.long(), index)
    # Around: the index of the wrapped data set. Inside: the place in the subset.
    image, _, index = next(iter(DataLoader(Subset(indexed, [7, 2]), batch_size=2)))
    assert index.tolist() == image.tolist() == [7, 2]
    image, _, index = next(iter(DataLoader(IndexedDataset(Subset(indexed.dataset, [7, 2])),
                                           batch_size=2)))  # fmt: skip
    assert (index.tolist(), image.tolist()) == ([0, 1], [7, 2])
    joined = IndexedDataset(ConcatDataset([Numbers("tuple", 4), Numbers("tuple", 3)]))
    assert [item[-1] for item in (joined[i] for i in range(len(joined)))] == list(range(7))
    around = ConcatDataset([indexed, indexed])
    assert around[12][-1] == 2
    for add in (lambda: indexed + indexed, lambda: indexed + Numbers("tuple")):
        with pytest.raises(TypeError, match=r"each would count from 0; wrap the sum, `IndexedDat"):
            add()


def test_a_namedtuple_with_a_renamed_field():
    item = namedtuple("Item", ["image", "class"], rename=True)
    (found,) = IndexedDataset([item(3, 4)]).__getitems__([0])
    assert found == (3, 4, 0)
    assert found._fields == ("image", "_1", "index")


def test_negative_and_numpy_indices():
    indexed = IndexedDataset(Numbers("tensor"))
    assert indexed[-1] == (torch.tensor(9.0), 9)
    assert indexed[np.int64(4)] == (torch.tensor(4.0), 4)
    assert len(list(indexed)) == 10
    for wrong in (10, -11):
        with pytest.raises(IndexError, match=rf"in \[-10, 9\], but got {wrong}"):
            indexed[wrong]
    for wrong in ("3", 1.0, slice(2), [0, 1]):
        with pytest.raises(TypeError, match=r"`index` to be an int, but got .*batch_sampler"):
            indexed[wrong]


def test_batches_are_fetched_at_once_where_the_data_set_can():
    class Batched(Numbers):
        calls = asked = 0

        def __len__(self):
            Batched.asked += 1
            return super().__len__()

        def __getitems__(self, indices):
            Batched.calls += 1
            return [self[i] for i in indices]

    IndexedDataset(Batched("tuple")).__getitems__([1, 2, 3])
    assert (Batched.calls, Batched.asked) == (1, 1)
    Batched.calls = 0
    batches = list(DataLoader(IndexedDataset(Batched("tuple")), batch_size=5))
    assert Batched.calls == 2
    assert batches[1][-1].tolist() == [5, 6, 7, 8, 9]


def test_a_data_set_whose_batch_is_no_list_of_items_is_refused():
    class Columns(Numbers):
        def __getitems__(self, indices):
            return {"image": torch.zeros(len(indices)), "mask": torch.zeros(len(indices))}

    with pytest.raises(TypeError, match="return a list of 2 items, but got dict"):
        IndexedDataset(Columns("dict")).__getitems__([0, 1])

    class Without(Numbers):
        __getitems__ = None

    assert IndexedDataset(Without("tensor")).__getitems__([3]) == [(torch.tensor(3.0), 3)]


def test_a_read_only_mapping_gets_its_entry():
    assert IndexedDataset([MappingProxyType({"image": 1.0})])[0] == {"image": 1.0, "index": 0}


def test_the_data_sets_own_item_is_not_changed():
    cached = [{"image": 1.0}]
    assert IndexedDataset(cached)[0] == {"image": 1.0, "index": 0}
    assert cached == [{"image": 1.0}]


def test_a_tensor_data_set_with_a_custom_tuple_gets_a_plain_one():
    class Row(tuple):
        __slots__ = ()

    assert IndexedDataset([Row((1, 2))])[0] == (1, 2, 0)


def test_errors():
    class Stream(IterableDataset):
        def __len__(self):
            return 3

        def __getitem__(self, i):
            return i

        def __iter__(self):
            return iter(range(3))

    for wrong in (Stream(), iter([1, 2]), 3, Numbers):
        with pytest.raises(TypeError, match=r"map-style.*num_samples=None"):
            IndexedDataset(wrong)
    with pytest.raises(ValueError, match="new name in the items, but got 'image', which is there"):
        IndexedDataset(Numbers("dict"), key="image")[0]
    for key in ("sample id", "class", "_i"):
        with pytest.raises(ValueError, match=f"field name .* got '{key}'"):
            IndexedDataset(Numbers("namedtuple"), key=key)[0]
    with pytest.raises(ValueError, match="got 'mask'"):
        IndexedDataset(Numbers("namedtuple"), key="mask")[0]


def test_tensor_data_set():
    data = TensorDataset(torch.arange(4.0), torch.arange(4))
    assert [item[-1] for item in IndexedDataset(data)] == [0, 1, 2, 3]


def test_an_indexed_dataset_is_not_indexed_twice():
    once = IndexedDataset(list(range(5)))
    with pytest.raises(TypeError, match="an IndexedDataset, which yields its index already; pass"):
        IndexedDataset(once)
    with pytest.raises(TypeError, match=r"a Subset of an IndexedDataset, .*; build that of the"):
        IndexedDataset(Subset(Subset(once, [0, 1]), [0]))
    with pytest.raises(TypeError, match="a ConcatDataset of an IndexedDataset"):
        IndexedDataset(ConcatDataset([[1, 2], once]))


def test_a_subset_of_an_indexed_dataset_needs_a_row_for_each_of_the_whole():
    whole = IndexedDataset([(torch.zeros(1), torch.zeros(1))] * 10)
    part, _ = random_split(whole, [4, 6], torch.Generator().manual_seed(0))
    criterion = AdaptivePerturbation(len(part))
    x, y, index = next(iter(DataLoader(part, batch_size=4)))
    with pytest.raises(IndexError, match=r"every sample of the indexed dataset, .*random_split"):
        criterion(x.requires_grad_(), y, index)
    with pytest.raises(ValueError, match=r"got None; .*remove_unused_columns=False"):
        criterion(x, y)


@pytest.mark.parametrize("form", [*ITEMS, "mixed"])
def test_a_batch_is_what_its_items_are(form):
    class Mixed(Numbers):
        def __getitem__(self, i):
            return ITEMS[list(ITEMS)[i % len(ITEMS)]](i)

    indexed = IndexedDataset((Mixed if form == "mixed" else Numbers)(form))
    for indices in ([3, 0, 9], [-1, 2], [np.int64(4), 5], (1, 2), [2, 2], []):
        batch = indexed.__getitems__(indices)
        assert batch == [indexed[i] for i in indices]
        assert [type(item) for item in batch] == [type(indexed[i]) for i in indices]
    with pytest.raises(IndexError, match=r"in \[-10, 9\], but got 10"):
        indexed.__getitems__([0, 10])


def test_a_batch_of_mappings_with_the_name_taken_is_refused():
    with pytest.raises(ValueError, match="got 'image', which is there"):
        IndexedDataset(Numbers("dict"), key="image").__getitems__([0, 1])


class Loaded(Numbers):
    """Has an epoch and a state, as datasets that loaders resume have."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def state_dict(self):
        return {"epoch": self.epoch}

    def load_state_dict(self, state):
        self.epoch = state["epoch"]


def test_an_epoch_and_a_state_are_those_of_the_wrapped_data_set():
    plain = IndexedDataset(Numbers("tuple"))
    assert not any(hasattr(plain, n) for n in ("set_epoch", "state_dict", "load_state_dict"))
    for indexed in (
        IndexedDataset(Loaded("tuple")),
        copy.deepcopy(IndexedDataset(Loaded("tuple"))),
        pickle.loads(pickle.dumps(IndexedDataset(Loaded("tuple")))),
    ):
        indexed.set_epoch(3)
        assert indexed.dataset.epoch == 3
        assert indexed.state_dict() == {"epoch": 3}
        indexed.load_state_dict({"epoch": 5})
        assert indexed.dataset.epoch == 5
        # Where isinstance looks for a protocol's names from Python 3.12 on: not in __getattr__.
        inspect.getattr_static(indexed, "state_dict")


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # by torchdata's import
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stateful_loader_resumes_the_wrapped_data_set(workers):
    loader = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader

    def loaded():
        indexed = IndexedDataset(Loaded("tuple"))
        torch.manual_seed(0)
        return indexed, loader(indexed, batch_size=2, shuffle=True, num_workers=workers)

    indexed, whole = loaded()
    indexed.set_epoch(7)
    batches = iter(whole)
    before = [next(batches)[-1].tolist() for _ in range(2)]
    state = whole.state_dict()
    after = [index.tolist() for *_, index in batches]
    indexed, rest = loaded()
    torch.manual_seed(1)
    rest.load_state_dict(state)
    assert [index.tolist() for *_, index in rest] == after  # each once, by the same number
    assert sorted(i for index in before + after for i in index) == list(range(10))
    if workers == 0:  # else the workers' copies hold it
        assert indexed.dataset.epoch == 7


def test_accelerate_tells_the_wrapped_data_set_its_epoch():
    accelerate = pytest.importorskip("accelerate")
    loader = accelerate.Accelerator(cpu=True).prepare(DataLoader(IndexedDataset(Loaded("tuple"))))
    loader.set_epoch(4)
    assert loader.dataset.dataset.epoch == 4
