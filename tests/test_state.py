"""Tensors that travel with a module without being its buffers; any module, not only the loss."""

import copy
import io
import pickle

import pytest
import torch
from ranks import run
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.testing import assert_close

from sc_bce._state import Stateful, reseed


class Counter(Stateful):
    """Two tensors, one of which decides how it is shown; and a buffer."""

    def __init__(self, rows=3, generator=None, device=None):
        super().__init__()
        self.generator = generator
        self.register_buffer("weight", torch.ones(2, device=device))
        self.register_buffer("unused", None)
        self._own = {
            "level": torch.zeros(rows, device=device),
            "steps": torch.zeros((), dtype=torch.int64, device=device),
        }
        self.shown = None

    def held(self):
        return self._own

    def hold(self, tensors):
        self._own = {**self._own, **tensors}
        self.shown = None if self._own["steps"].is_meta else int(self._own["steps"])

    def refusal(self, saved):
        return "Expected no level of 9, but got one" if 9 in saved.get("level", []) else None


def moved(**options):
    counter = Counter(**options)
    counter.hold({"level": torch.tensor([0.1, 0.2, 0.3]), "steps": torch.tensor(7)})
    counter.weight.fill_(2.0)
    return counter


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def state(counter):
    return {name: value.clone() for name, value in counter.state_dict().items()}


def same(one, other):
    assert list(one) == list(other)
    for name, value in other.items():
        assert one[name].dtype == value.dtype
        assert torch.equal(one[name], value), name


def test_the_state_has_the_buffers_then_what_is_held_and_a_generator():
    assert list(moved().state_dict()) == ["weight", "level", "steps"]
    with_one = moved(generator=seeded(0)).state_dict(prefix="a.")
    assert list(with_one) == ["a.weight", "a.level", "a.steps", "a.generator"]
    assert list(moved(generator=seeded(0)).held()) == ["level", "steps"]  # and nothing more


def test_what_is_held_is_an_attribute_and_no_buffer():
    counter = moved()
    assert torch.equal(counter.level, counter.held()["level"])
    assert [name for name, _ in nn.ModuleList([counter]).named_buffers()] == ["0.weight"]
    assert [name for name, _ in counter.named_buffers()] == ["weight"]  # as DDP asks its root
    own = dict(counter.named_buffers(recurse=False))
    assert list(own) == ["weight", "level", "steps"]  # as torch.distributed.checkpoint asks
    model = nn.ModuleDict({"counter": counter})
    assert set(get_model_state_dict(model)) == set(model.state_dict())
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        _ = counter.absent
    with pytest.raises(AttributeError, match="no attribute '_own'"):
        _ = Counter.__new__(Counter)._own


def test_it_keeps_its_dtype_and_follows_the_device():
    counter, before = moved(), state(moved())
    counter.half()
    assert counter.weight.dtype == torch.float16
    same({k: v for k, v in state(counter).items() if k != "weight"},
         {k: v for k, v in before.items() if k != "weight"})  # fmt: skip
    assert counter.to("meta").level.is_meta
    assert counter.steps.is_meta


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "state", "assigned", "distributed"])
def test_a_copy_holds_the_same_and_is_independent(way):
    counter = moved()
    before = state(counter)
    if way == "deepcopy":
        other = copy.deepcopy(counter)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(counter))
    else:
        file, other = io.BytesIO(), Counter()
        torch.save(counter.state_dict(), file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        if way == "distributed":
            set_model_state_dict(other, loaded)
        else:
            other.load_state_dict(loaded, assign=way == "assigned")
    same(state(other), before)
    assert other.shown == 7
    other.level.fill_(5.0)
    same(state(counter), before)


def test_a_state_dict_is_a_copy_either_way():
    counter, other = moved(), Counter()
    given = counter.state_dict()
    counter.level.fill_(5.0)
    assert_close(given["level"], torch.tensor([0.1, 0.2, 0.3]))
    other.load_state_dict(given, assign=True)
    other.level.fill_(6.0)
    assert_close(given["level"], torch.tensor([0.1, 0.2, 0.3]))


def test_loading_casts_to_the_dtypes_held():
    counter = Counter()
    counter.load_state_dict({k: v.double() for k, v in moved().state_dict().items()})
    same(state(counter), state(moved()))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"level": torch.full((3,), 9.0)}, "Expected no level of 9, but got one"),
        ({"level": torch.zeros(4)}, "Expected argument `level` to be of shape (3,) in the saved"),
        ({"generator": torch.zeros(5, dtype=torch.uint8)}, "`generator` to be of shape"),
        ({"weight": torch.zeros(3)}, "size mismatch for weight"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_in_one_sentence_and_nothing_is_loaded(
    changed, text, assign
):
    counter = moved(generator=seeded(1))
    before, weight = state(counter), counter.weight
    given = state(moved(generator=seeded(2))) | {"weight": torch.zeros(2)} | changed
    for strict in (True, False):
        with pytest.raises(RuntimeError) as caught:
            counter.load_state_dict(given, strict=strict, assign=assign)
        (sentence,) = str(caught.value).split("\n\t")[1:]
        assert text in sentence
        same(state(counter), before)
        assert counter.weight is weight


def test_missing_and_unexpected_keys():
    given = state(moved())
    del given["steps"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "steps"'):
        Counter().load_state_dict(given)
    counter = Counter()
    result = counter.load_state_dict(given | {"more": torch.zeros(1)}, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["steps"], ["more"])
    assert torch.equal(counter.level, given["level"])
    assert int(counter.steps) == 0


def test_hooks_may_rename_keys():
    counter = Counter()
    counter.register_load_state_dict_pre_hook(
        lambda module, state, *rest: state.update(level=state.pop("levels"))
    )
    given = state(moved())
    given["levels"] = given.pop("level")
    counter.load_state_dict(given)
    same(state(counter), state(moved()))


@pytest.mark.parametrize("assign", [False, True])
def test_built_on_meta_and_loaded(assign):
    counter = Counter(device="meta")
    if not assign:
        counter.to_empty(device="cpu")
    counter.load_state_dict(moved().state_dict(), assign=assign)
    same(state(counter), state(moved()))
    assert counter.shown == 7


def test_what_is_loaded_in_inference_mode_is_an_ordinary_tensor():
    counter = Counter()
    with torch.inference_mode():
        given = {name: value * 1 for name, value in moved().state_dict().items()}
        counter.load_state_dict(given)
    assert not counter.level.is_inference()
    counter.level.add_(1)


# -- generators


def test_a_generator_goes_on_where_it_was_saved():
    counter, other = moved(generator=seeded(3)), moved(generator=seeded(4))
    torch.rand(5, generator=counter.generator)
    other.load_state_dict(counter.state_dict())
    assert torch.equal(other.generator.get_state(), counter.generator.get_state())
    assert torch.equal(*(torch.rand(3, generator=one.generator) for one in (counter, other)))


def test_one_process_reseeds_nothing():
    generator = seeded(3)
    before = generator.get_state()
    reseed(generator, torch.device("cpu"), None)
    assert torch.equal(generator.get_state(), before)


def reseeded(rank, world):
    counter = Counter(generator=seeded(rank))
    reseed(counter.generator, torch.device("cpu"), None)
    return state(counter)["generator"], torch.rand(4, generator=counter.generator)


def served(rank, world, saved):
    """The checkpoint of one rank, loaded on each."""
    counter = Counter(generator=seeded(99))
    counter.load_state_dict(state(counter) | {"generator": saved})
    return torch.rand(4, generator=counter.generator)


def test_the_checkpoint_of_any_rank_restores_the_generator_of_each():
    ranks = run(2, reseeded)
    drawn = [numbers for _, numbers in ranks]
    assert not torch.equal(*drawn)
    for saved, _ in ranks:
        for got, want in zip(run(2, served, saved), drawn, strict=True):
            assert torch.equal(got, want)
