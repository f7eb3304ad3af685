"""Columns of the table: look up, write, mean by row, merge; and the rows of a batch."""

import math
import warnings

import numpy as np
import pytest
import torch
from devices import array, tensor
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds

from sc_bce.losses import table as module
from sc_bce.losses.table import look_up, mean_by_row, merged, rows_of, write

FEWEST = int(torch.get_default_device().type == "xla")  # where a batch of nothing is not tried


LIMITS = torch.zeros(()), torch.tensor(0.4)


def made(rows=5):
    return torch.full((rows,), 0.25)


@given(seeds, st.integers(FEWEST, 9), st.integers(1, 6), st.booleans())
def test_a_row_that_occurs_more_than_once_gets_the_mean_and_is_clipped_after_it(
    seed, places, rows, limited
):
    rng = np.random.default_rng(seed)
    index, values = rng.integers(0, rows, places), rng.normal(0, 2, places).astype(np.float32)
    want = np.full(rows, 0.25)
    for row in set(index.tolist()):
        want[row] = values[index == row].mean()
        want[row] = np.clip(want[row], 0.0, 0.4) if limited else want[row]
    column = made(rows)
    write(column, tensor(index), tensor(values), LIMITS if limited else None)
    np.testing.assert_allclose(array(column), want, rtol=1e-5, atol=1e-6)
    assert look_up(column, tensor(index)).tolist() == pytest.approx(want[index].tolist(), abs=1e-6)


def test_rows_that_cannot_be_read_are_written_alike():
    rows, values = torch.tensor([2, 0, 2, 2, 1]), torch.tensor([0.1, 0.2, 9.0, -9.4, 0.3])
    column, other = made(), made()
    write(column, rows, values, LIMITS)
    with torch.inference_mode():
        unreadable = rows.clone()
    with torch.no_grad():
        write(other, unreadable, values, LIMITS)
    assert other.tolist() == column.tolist() == pytest.approx([0.2, 0.3, 0.0, 0.25, 0.25])


def test_a_table_of_millions_is_clipped_where_it_was_written():
    rows, values = torch.tensor([2, 0, 2, 2, 1]), torch.tensor([0.1, 0.2, 9.0, -9.4, 0.3])
    small, large = made(), made((1 << 20) + 1)
    large[9] = 7.0  # beyond the limits, but no row of the batch
    for column in (small, large):
        write(column, rows, values, LIMITS)
        write(column, torch.tensor([4, 4]), torch.tensor([0.3, 0.9]), LIMITS)
    assert large[:5].tolist() == small.tolist()
    assert large[4] == LIMITS[1]
    assert large[9] == 7.0


def test_rows_are_written_alike_where_torch_is_asked_to_be_deterministic():
    column = made()
    torch.use_deterministic_algorithms(True)
    try:  # by means by row
        write(column, torch.tensor([2, 0, 2]), torch.tensor([0.1, 0.2, 0.5]), LIMITS)
    finally:
        torch.use_deterministic_algorithms(False)
    assert column.tolist() == pytest.approx([0.2, 0.25, 0.3, 0.25, 0.25])


@given(seeds, st.integers(FEWEST, 12), st.integers(1, 6))
def test_means_by_row_are_those_of_a_loop(seed, places, rows):
    """What an accelerator writes where torch is asked to be deterministic."""
    rng = np.random.default_rng(seed)
    index, values = rng.integers(0, rows, places), rng.normal(size=places).astype(np.float32)
    mean = mean_by_row(tensor(index), tensor(values))
    want = [values[index == row].mean() for row in index]
    np.testing.assert_allclose(array(mean), np.array(want, dtype=np.float32), atol=1e-6)


# -- between processes


def by_turns(value, group):
    """In place of `reduced`: a group that is a function of what its process brings."""
    return group(value)


def reductions(tables):
    """The group of each of several ranks that run one after another.

    Each call of a rank is answered by the sum of what all ranks bring to this call, which is
    known from a first run that records what each rank brings.
    """
    brought = []
    for columns, moved in tables:
        calls = []
        merged(columns, moved, lambda value, calls=calls: calls.append(value) or value)
        brought.append(calls)
    sums = [sum(call) for call in zip(*brought, strict=True)]

    def of_one_rank():
        answers = iter(sums)
        return lambda value: next(answers)

    return of_one_rank


@given(seeds, st.integers(1, 4), st.integers(1, 7), st.integers(1, 8))
def test_a_row_becomes_the_mean_of_those_that_moved_it(seed, ranks, rows, chunk):
    rng = np.random.default_rng(seed)
    tables = []
    for _ in range(ranks):
        columns = {name: tensor(rng.random(rows)).float() for name in ("alpha", "beta")}
        tables.append((columns, tensor(rng.random(rows) < 0.5)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK", chunk)
        patch.setattr(module, "reduced", by_turns)
        group = reductions(tables)
        for columns, moved in tables:
            before = {name: column.clone() for name, column in columns.items()}
            new, anywhere = merged(columns, moved, group())
            for name, column in columns.items():
                assert torch.equal(column, before[name])  # the table itself is left alone
                for row in range(rows):
                    values = [float(c[name][row]) for c, m in tables if m[row]]
                    want = sum(values) / len(values) if values else float(column[row])
                    assert float(new[name][row]) == pytest.approx(want, abs=1e-6)
                    assert bool(anywhere[row]) == bool(values)


def test_a_reduction_that_fails_leaves_the_table_whole(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 1)
    monkeypatch.setattr(module, "reduced", by_turns)
    columns, moved = {"alpha": torch.tensor([0.1, 0.2])}, torch.tensor([True, False])
    calls = []

    def dies(value):
        calls.append(value)
        if len(calls) == 2:
            raise RuntimeError("connection closed by peer")
        return value

    with pytest.raises(RuntimeError, match="closed by peer"):
        merged(columns, moved, dies)
    assert columns["alpha"].tolist() == pytest.approx([0.1, 0.2])
    assert moved.tolist() == [True, False]


# -- the rows of a batch

X = torch.zeros(2, 3)
by_value = pytest.mark.cpu_only("an accelerator would wait for a look at the values")
BAD = [
    (None, ValueError, "in training, but got None; wrap .* IndexedDataset .* num_samples=None"),
    ([0, 1], TypeError, r"integer Tensor, but got list; pass `torch.as_tensor\(index\)`"),
    (torch.zeros(2), TypeError, "got torch.float32; pass `index.long"),
    (torch.zeros(2, dtype=torch.bool), TypeError, "got torch.bool"),
    (torch.arange(3), ValueError, r"shape \(2,\), but got shape \(3,\)"),
    (torch.zeros(2, 1, dtype=torch.int64), ValueError, r"got shape \(2, 1\)"),
    pytest.param(
        torch.tensor([0, 5]),
        IndexError,
        r"\[0, 4\], but got 5; num_samples=5 .*Subset.*`resize`",
        marks=by_value,
    ),
    pytest.param(torch.tensor([-1, 0]), IndexError, r"\[0, 4\], but got -1", marks=by_value),
]


@pytest.mark.parametrize(("index", "kind", "text"), BAD, ids=range(len(BAD)))
def test_a_bad_index_is_refused(index, kind, text):
    column = made()
    with pytest.raises(kind, match=text):
        look_up(column, rows_of(index, X, column, False))


@by_value
def test_an_index_made_in_inference_mode_is_refused_alike():
    with torch.inference_mode():
        index = torch.tensor([0, 5])
    with pytest.raises(IndexError, match="but got 5; num_samples=5"):
        look_up(made(), rows_of(index, X, made(), False))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint16, torch.int32])
def test_an_index_of_any_integer_dtype(dtype):
    rows = rows_of(torch.tensor([4, 0]).to(dtype), X, made(), False)
    assert (rows.tolist(), rows.dtype) == ([4, 0], torch.int64)


def test_the_rows_of_a_scalar_of_nothing_and_of_one_shared_level():
    assert rows_of(torch.tensor(3), torch.tensor(1.0), made(), False).tolist() == [3]
    none = torch.zeros(0, dtype=torch.int64)
    assert rows_of(none, torch.zeros(0, 3), made(), False).tolist() == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rows_of(None, X, made(1), True).tolist() == [0, 0]
        assert rows_of(torch.tensor([math.nan]), X, made(1), True).tolist() == [0, 0]


def test_a_batch_on_another_device_is_told_where_the_table_is():
    text = r"table's device \w+(:0)?, but got meta; .*`criterion.to\('meta'\)"
    with pytest.raises(ValueError, match=text):
        rows_of(torch.arange(2), X.to("meta"), made(), False)
