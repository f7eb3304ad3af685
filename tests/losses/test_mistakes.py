"""What looks like a mistake in training is named; what is right never is."""

import warnings

import pytest
import torch
from tables import Measured, build, climbing, moving, put, saved
from torch.utils.data import WeightedRandomSampler

from sc_bce import AdaptivePerturbation, CalibrationHistogram, SCBCEWithLogitsLoss
from sc_bce.losses import mistakes

no_checkpoints = pytest.mark.not_on("xla", "torch.utils.checkpoint asks for torch.xla")
NEVER = (
    "AdaptivePerturbation has trained past its warm-up, but step() was never called, so the levels "
    "don't move and the loss is plain BCE; call `criterion.step(histogram)` after each epoch"
)
POSITION = (
    "since the last step only the first rows of the criterion's table were trained; pass the index "
    "of each sample in the dataset, as IndexedDataset yields it, not its position in the batch"
)
OFTEN = "step() was called again after few samples; call it once per epoch, not per batch"


class Large(Measured):
    """Measured on a validation set of 10,000 elements."""

    def reliability(self, bins):
        return self

    @property
    def count(self):
        return torch.tensor([10_000])


def batch(criterion, rows, **options):
    """One training batch of these rows."""
    rows = torch.as_tensor(rows)
    x = 5 * torch.randn(len(rows), 3, requires_grad=True)
    index = () if criterion.num_samples is None else (rows,)
    return criterion(x, torch.rand(len(rows), 3) < 0.3, *index, **options)


def validate(criterion, batches=2):
    criterion.eval()
    with torch.no_grad():
        for _ in range(batches):
            batch(criterion, torch.arange(4))
    criterion.train()


def said(call, *arguments):
    """The texts of the warnings, each once; all at the user's line."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call(*arguments)
    assert {one.filename for one in caught} <= {__file__}
    return list(dict.fromkeys(str(one.message) for one in caught))


def epochs(criterion, sampler, number=3, size=10, measured=Large()):  # noqa: B008
    """Training as it should be: batches, a validation, a step."""
    for _ in range(number):
        for rows in torch.as_tensor(list(sampler())).split(size):
            batch(criterion, rows)
        validate(criterion)
        criterion.step(measured)


# -- samplers, in correct use


def oversampled():
    """Positives as often as negatives: twice as many samples as rows, few of them positive."""
    weights = torch.where(torch.arange(200) < 10, 19.0, 1.0)
    return list(WeightedRandomSampler(weights, 390))


SAMPLERS = {
    "in order": lambda: range(200),
    "shuffled": lambda: torch.randperm(200),
    "with replacement": lambda: torch.randint(0, 200, (200,)),
    "class-balanced": lambda: list(
        WeightedRandomSampler(torch.where(torch.arange(200) < 10, 19.0, 1.0), 200)
    ),
    "oversampled": oversampled,
    "repeated augmentation": lambda: torch.randperm(200)[:67].repeat_interleave(3)[:200],
    "three copies": lambda: torch.randperm(200).repeat_interleave(3),
    "small subset": lambda: torch.randperm(12),
    "subset at the end": lambda: 150 + torch.randperm(40),
    "a fold": lambda: torch.randperm(100) + 100,
    "the first fold": lambda: torch.randperm(100),
}


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("make", [build, moving, climbing])
def test_no_sampler_is_warned_of(make, name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        epochs(make(200), SAMPLERS[name])


@pytest.mark.parametrize(("rows", "touched"), [(2000, 895), (300, 100)])
def test_the_samplers_of_the_issue(rows, touched):
    """A base rate of 5 %, class-balanced; three copies of 100 of 300 samples."""
    seen = torch.randperm(rows)[:touched]
    more = seen[torch.randint(0, touched, (rows - touched,))]
    criterion = moving(rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        epochs(criterion, lambda: torch.cat((seen, more)), size=50)
    assert int((criterion.state_dict()["visited"] > 0).sum()) == touched


@pytest.mark.parametrize("first", [20, 49])
def test_a_small_subset_of_the_first_rows_is_no_position(first):
    """In batches as large as it, over many epochs: fewer samples than rows between two steps."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        epochs(moving(1000), lambda: range(first), number=30, size=64)


def test_accumulation_short_epochs_and_full_batches_never_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rows in (8, None):
            criterion = build(rows, warmup=2)
            for _ in range(5):
                for index in torch.arange(8).split(2):
                    (batch(criterion, index) / 4).backward()
                validate(criterion)
                criterion.step(Large())
            whole = build(rows and 2000)
            for _ in range(15):  # one batch an epoch, of data as large as the validation's
                batch(whole, torch.arange(2000)).backward()
                whole.step(Large())


def test_a_validation_without_no_grad_never_warns():
    criterion = moving(40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            for rows in torch.randperm(40).split(8):
                batch(criterion, rows).backward()
            criterion.eval()
            for _ in range(9):
                criterion(torch.randn(50, 3, requires_grad=True), torch.rand(50, 3))
            criterion.train()
            criterion.step(Large())


def test_wholly_ignored_samples_are_no_positions():
    criterion = build(10, ignore_index=255)
    x, y = torch.randn(10, 4, requires_grad=True), torch.randint(0, 2, (10, 4))
    y[4:] = 255
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            for rows in torch.arange(10).split(5):
                criterion(x[rows], y[rows], rows)
            criterion.step(Measured())


def test_a_forward_that_notes_nothing_counts_for_nothing():
    """Four losses per batch are no sign of a missing step, nor of an index that is a position."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rows in (8, None):
            criterion = build(rows)
            for _ in range(4):
                for index in torch.arange(8).split(2):
                    for _ in range(9):
                        batch(criterion, index, update=False)
                    criterion.update(torch.zeros(2), torch.ones(2), rows and index)
                validate(criterion)
                criterion.step(Measured())
        criterion = moving(100)
        for _ in range(60):
            batch(criterion, torch.arange(2), update=False)
        batch(criterion, torch.arange(2))
        criterion.step(Measured())


def test_an_epoch_resumed_before_its_end_never_warns():
    criterion = moving(200)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        epochs(criterion, lambda: range(200), number=2)
        batch(criterion, torch.arange(190))
        resumed = build(200)
        resumed.load_state_dict(criterion.state_dict())
        batch(resumed, torch.arange(190, 200))  # ten samples are left
        resumed.step(Measured())


# -- an index that is a position


@pytest.mark.parametrize("make", [build, moving, climbing])
def test_positions_in_a_batch_are_named(make):
    criterion = make(60)

    def epoch():
        for rows in torch.arange(60).split(8):
            batch(criterion, torch.arange(len(rows)))
        criterion.step(Measured())

    assert said(epoch) == [POSITION]
    assert said(epoch) == [POSITION]  # the same text, which Python shows once
    known = saved(criterion)["visited"]
    assert known.tolist() == [1] * 8 + [0] * 52


# -- a step that is missing


def test_training_on_without_a_step_is_named():
    criterion = build(4, warmup=2)
    assert said(lambda: [batch(criterion, torch.arange(4)) for _ in range(2)]) == []
    assert said(batch, criterion, torch.arange(4)) == [NEVER]
    assert said(lambda: [batch(criterion, torch.arange(4)) for _ in range(9)]) == []
    criterion.reset_parameters()  # which forgets what was seen
    assert said(batch, criterion, torch.arange(4)) == []


def test_a_sampler_that_repeats_samples_is_told_later():
    criterion = build(4)
    some = torch.tensor([0, 1, 1, 2])  # never the last row
    assert said(lambda: [batch(criterion, some) for _ in range(3)]) == []
    assert said(batch, criterion, some) == [NEVER]


def test_one_shared_level_is_told_of_a_forgotten_step_once_epochs_went_by():
    criterion = build(None)

    def epoch():
        for _ in range(5):
            batch(criterion, torch.arange(4))
        validate(criterion)

    assert [said(epoch) for _ in range(4)] == [[], [], [NEVER], [NEVER]]


def test_forwards_under_no_grad_are_evaluation_phases_too_and_one_alone_is_none():
    criterion = build(None)

    def epoch(looks):
        batch(criterion, torch.arange(4))
        with torch.no_grad():  # in training mode
            for _ in range(looks):
                batch(criterion, torch.arange(4))

    # As reentrant checkpointing does, or a training loss that is logged.
    assert [said(epoch, 1) for _ in range(9)] == [[]] * 9
    assert [said(epoch, 2) for _ in range(4)] == [[], [], [NEVER], [NEVER]]


def test_one_shared_level_without_any_validation_is_told_after_many_batches(monkeypatch):
    monkeypatch.setattr(mistakes, "PATIENCE", 30)
    criterion = build(None)
    assert said(lambda: [batch(criterion, torch.arange(4)) for _ in range(30)]) == []
    assert said(batch, criterion, torch.arange(4)) == [NEVER]


@pytest.mark.parametrize("rows", [4, None])
def test_who_steps_is_never_told_of_a_forgotten_step(rows):
    criterion = build(rows, warmup=100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batch(criterion, torch.arange(4))
        criterion.step(Measured())
        for _ in range(20):
            for _ in range(30):
                batch(criterion, torch.arange(4))
            validate(criterion)
        loaded = put(build(rows), steps=1)
        for _ in range(20):
            batch(loaded, torch.arange(4))
            validate(loaded)


# -- a step too often


def test_a_step_per_batch_is_named_for_a_table():
    criterion = AdaptivePerturbation(100)

    def stepped(rows):
        batch(criterion, rows)
        criterion.step(Large())

    texts = [said(stepped, rows) for rows in torch.arange(80).split(4)]
    assert texts[:10] == [[]] * 10  # of that size epochs could be
    assert texts[10:] == [[OFTEN]] * 10


def test_a_step_per_batch_is_named_for_one_shared_level():
    criterion = AdaptivePerturbation(None)

    def stepped():
        batch(criterion, torch.arange(4))
        criterion.step(Large())

    assert [said(stepped) for _ in range(12)] == [[]] * 9 + [[OFTEN]] * 3


# -- a histogram of all epochs


@pytest.mark.parametrize("rows", [None, 4])
@pytest.mark.parametrize("grows", [True, False])
def test_a_histogram_that_is_never_reset_is_named(rows, grows):
    criterion, histogram = build(rows), CalibrationHistogram()

    def epoch():
        batch(criterion, torch.arange(4))
        if not grows:
            histogram.reset()
        histogram.update(torch.randn(100), torch.arange(100) < 30)
        criterion.step(histogram)

    texts = [said(epoch) for _ in range(7)]
    grown = (
        "the histogram that step() gets grows from epoch to epoch; call `histogram.reset()` before "
        "each validation, or make a new one"
    )
    assert texts == [[], [], [], [], [grown] if grows else [], [], []]


# -- logits, weights, modes


def test_probabilities_are_named():
    criterion = build(60)
    x = torch.linspace(0, 1, 60).reshape(60, 1).requires_grad_()
    y = torch.rand(60, 1) < 0.5
    (text,) = said(lambda: criterion(x, y, torch.arange(60)))
    assert text.startswith("all logits of a training batch look like probabilities; pass the raw")


def test_probabilities_that_looked_like_logits_are_named_after_a_step():
    criterion, rows = build(60, warmup=100), torch.arange(60)
    untrained = (0.45 + 0.1 * torch.rand(60, 1)).requires_grad_()
    trained = torch.linspace(0, 1, 60).reshape(60, 1).requires_grad_()
    y = torch.rand(60, 1) < 0.5
    for x in [untrained] * mistakes.LOOKS + [trained]:
        assert said(lambda x=x: criterion(x, y, rows)) == []
    criterion.step(Measured())
    (text,) = said(lambda: criterion(trained, y, rows))
    assert text.startswith("all logits of a training batch look like probabilities")


@pytest.mark.parametrize("fixed", [True, False])
def test_a_backward_pass_through_a_loss_of_evaluation_mode_is_named(fixed):
    criterion = SCBCEWithLogitsLoss(alpha=0.1) if fixed else AdaptivePerturbation(4)
    x, y = torch.randn(4, 2, requires_grad=True), torch.randint(0, 2, (4, 2))
    criterion.eval()
    loss = criterion(x, y)
    with pytest.warns(UserWarning, match=r"evaluation mode.*`criterion.train\(\)`"):
        loss.backward()
    with torch.no_grad():
        criterion(x, y)


def test_an_index_for_one_shared_level_is_named():
    criterion = build(None)
    x, y = torch.randn(6, 2, requires_grad=True), torch.ones(6, 2)
    with pytest.warns(UserWarning, match="`index` is not used; pass num_samples=len") as caught:
        criterion(x, y, torch.arange(100, 106))
    assert [one.filename for one in caught] == [__file__]
    assert criterion.state_dict()["visited"].tolist() == [2]


@pytest.mark.parametrize(("weight", "options", "warned"), [
    (20.0, dict(prior=0.5), True),
    (20.0, dict(prior=0.5, num_labels=None, focus=0.0), True),
    ([[[1.0]], [[20.0]]], dict(num_labels=2), True),
    ([[[1.0]], [[2.0]]], dict(num_labels=2), False),
    ([[[1.0]], [[20.0]]], dict(prior=torch.full((2, 1, 1), 0.5)), True),
    (0.02, dict(), True),
    (20.0, dict(prior=0.5, level=0.0), False),  # no level yet
    (2.0, dict(), False),  # the odds of the negatives
    ([[[1.0, 2.0, 3.0]]], dict(num_labels=2), False),
])  # fmt: skip
def test_a_level_that_pos_weight_takes_to_one_side_is_named(weight, options, warned):
    criterion = build(4, pos_weight=torch.tensor(weight), **options)
    y = torch.tensor([1.0, 0.0, 0.0, 0.0]).reshape(4, 1, 1, 1).expand(4, 2, 1, 1)
    if weight == [[[1.0, 2.0, 3.0]]]:
        y = y.expand(4, 2, 1, 3)  # weights along another dimension than the prior

    def epoch():
        criterion(torch.zeros(y.shape, requires_grad=True), y, torch.arange(4)).backward()
        criterion.step(Measured(0.9, 1.0))

    texts = said(lambda: [epoch() for _ in range(3)])
    assert [text[:22] for text in texts] == ["at the levels reached,"] * warned


# -- where a warning points


class Wrapper(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *batch):
        return self.inner(*batch)


def called_by_a_hook(criterion, *batch):
    net = torch.nn.Sequential(torch.nn.Identity())
    net.register_forward_hook(lambda module, given, output: criterion(output, *batch[1:]))
    return net(batch[0])


def checkpointed(criterion, *batch):
    return torch.utils.checkpoint.checkpoint(criterion, *batch, use_reentrant=False)


WAYS = {
    "plain": lambda criterion, *batch: criterion(*batch),
    "wrapped": lambda criterion, *batch: Wrapper(Wrapper(criterion))(*batch),
    "hook": called_by_a_hook,
    "checkpoint": checkpointed,
    "update": lambda criterion, *batch: criterion.update(*batch),
}


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=no_checkpoints if way == "checkpoint" else ()) for way in WAYS]
)
def test_a_warning_names_the_users_line_whatever_lies_between(way):
    criterion = build(2)
    given = torch.zeros(2, requires_grad=True), torch.ones(2), torch.arange(2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(5):
            WAYS[way](criterion, *given)
    assert [one.filename for one in caught] == [__file__]
    with open(__file__) as file:
        line = file.readlines()[caught[0].lineno - 1]
    assert "criterion" in line or "self.inner(*batch)" in line


def test_a_warning_that_is_an_error_leaves_the_step_done():
    criterion = build(60)
    for rows in torch.arange(60).split(8):
        batch(criterion, torch.arange(len(rows)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="only the first rows"):
            criterion.step(Measured())
    assert int(criterion.state_dict()["steps"]) == 1
    assert float(criterion.alpha.mean()) > 0.2
