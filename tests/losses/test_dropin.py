"""At alpha = 0 every public loss is torch's, bit for bit, errors included."""

import copy
import inspect
import itertools
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sc_bce import AdaptivePerturbation, SCBCEWithLogitsLoss, sc_bce_with_logits

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((), (0, 3), (7,), (4, 3), (2, 3, 4, 5))
CASES = list(itertools.product(("none", "mean", "sum"), (False, True), (False, True), SHAPES))


def same(one, two):
    assert one.dtype == two.dtype
    assert one.shape == two.shape
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[one.element_size()]
    assert torch.equal(one.detach().view(bits), two.detach().view(bits))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("reduction", "weighted", "pos_weighted", "shape"), CASES)
def test_function_module_and_untouched_table_are_torchs_bce(
    reduction, weighted, pos_weighted, shape, dtype
):
    y = torch.rand(shape).to(dtype)
    labels = (*shape[1:2], *(1 for _ in shape[2:])) if len(shape) > 1 else shape
    weight = torch.rand(labels).to(dtype) if weighted else None
    pos_weight = (torch.rand(labels) * 3).to(dtype) if pos_weighted else None
    x0 = (torch.randn(shape) * 5).to(dtype)
    arguments = dict(weight=weight, pos_weight=pos_weight, reduction=reduction)
    samples = shape[0] if shape else 1
    index = torch.arange(samples).reshape(shape[:1])
    adaptive = AdaptivePerturbation(max(samples, 1), **arguments)
    losses = [
        lambda x: F.binary_cross_entropy_with_logits(x, y, **arguments),
        lambda x: sc_bce_with_logits(x, y, 0.0, **arguments),
        lambda x: sc_bce_with_logits(x, y, 0, 1.3, **arguments),
        lambda x: SCBCEWithLogitsLoss(**arguments)(x, y),
        lambda x: adaptive(x, y, index),
    ]
    results = []
    for loss in losses:
        x = x0.clone().requires_grad_()
        value = loss(x)
        value.sum().backward()
        results.append((value, x.grad))
    for value, grad in results[1:]:
        same(value, results[0][0])
        same(grad, results[0][1])


@pytest.mark.parametrize("mask", [torch.bool, torch.uint8, torch.int64])
def test_integer_masks_need_no_cast(mask):
    x, y = torch.randn(4, 3), torch.randint(0, 2, (4, 3))
    want = F.binary_cross_entropy_with_logits(x, y.float())
    same(sc_bce_with_logits(x, y.to(mask)), want)
    same(SCBCEWithLogitsLoss()(x, y.to(mask)), want)


ERRORS = [
    (torch.zeros(2), torch.zeros(3), {}),
    (torch.zeros(2), torch.zeros(2), dict(reduction="avg")),
    (torch.zeros(2, dtype=torch.int64), torch.zeros(2), {}),
    (torch.zeros(2, 3), torch.zeros(2, 3), dict(weight=torch.ones(2))),
    (torch.zeros(2, 3), torch.zeros(2, 3), dict(pos_weight=torch.ones(2))),
]


@pytest.mark.parametrize(("x", "y", "extra"), ERRORS)
def test_errors_are_torchs_own(x, y, extra):
    with pytest.raises(Exception) as ours:  # noqa: PT011
        sc_bce_with_logits(x, y, **extra)
    with pytest.raises(type(ours.value)) as theirs:
        F.binary_cross_entropy_with_logits(x, y, **extra)
    assert str(ours.value) == str(theirs.value)


def test_signature_begins_with_torchs():
    def names(cls):
        return [
            (p.name, p.default)
            for p in inspect.signature(cls.__init__).parameters.values()
            if p.kind is p.POSITIONAL_OR_KEYWORD
        ]

    assert names(SCBCEWithLogitsLoss) == names(nn.BCEWithLogitsLoss)
    assert issubclass(SCBCEWithLogitsLoss, nn.BCEWithLogitsLoss)


def test_deprecated_arguments_work_as_in_torch():
    for arguments in ((None, False), (None, None, False), (None, True, True)):
        with pytest.warns(UserWarning, match="size_average and reduce"):
            ours = SCBCEWithLogitsLoss(*arguments)
        with pytest.warns(UserWarning, match="size_average and reduce"):
            theirs = nn.BCEWithLogitsLoss(*arguments)
        assert ours.reduction == theirs.reduction


def test_state_dict_has_torchs_keys_and_loads_both_ways():
    weights = dict(weight=torch.rand(3), pos_weight=torch.rand(3))
    theirs = nn.BCEWithLogitsLoss(**weights)
    ours = SCBCEWithLogitsLoss(**weights, alpha=0.1, sampling="sample", generator=torch.Generator())
    assert list(ours.state_dict()) == list(theirs.state_dict()) == ["weight", "pos_weight"]
    fresh = SCBCEWithLogitsLoss(weight=torch.zeros(3), pos_weight=torch.ones(3), alpha=0.1)
    fresh.load_state_dict(theirs.state_dict())
    same(fresh.weight, weights["weight"])
    theirs.load_state_dict(fresh.state_dict())
    assert not SCBCEWithLogitsLoss(alpha=0.3).state_dict()


def test_module_moves_copies_and_pickles_like_torchs():
    criterion = SCBCEWithLogitsLoss(pos_weight=torch.ones(2), alpha=0.1, ignore_index=255)
    x, y = torch.randn(3, 2), torch.rand(3, 2)
    want = criterion(x, y)
    for clone in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        same(clone(x, y), want)
    assert criterion.double().pos_weight.dtype == torch.float64


def test_plain_use_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SCBCEWithLogitsLoss(alpha=0.1)(torch.zeros(2), torch.ones(2))
