import copy
import math
import warnings

import numpy as np
import pytest
import reference as ref
import torch
import torch._dynamo.testing
import torch.distributed as dist
import torch.nn.functional as F
from devices import array, lacks, refused, rng_state, seeded
from hypothesis import given
from hypothesis import strategies as st
from strategies import batches, pairs
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

from sc_bce import SCBCEWithLogitsLoss, sc_bce_with_logits
from sc_bce.losses.draws import truncated_normal

SETTINGS = {
    "label_smoothing": (SCBCEWithLogitsLoss.label_smoothing, 0.1, 1.0, 0.1, "expected", 0.0),
    "disturb_label": (SCBCEWithLogitsLoss.disturb_label, 0.2, 0.1, 2.0, "element", 0.0),
    "hard_inversion": (SCBCEWithLogitsLoss.hard_inversion, 0.2, 0.2, 2.0, "sample", 0.0),
    "soft_inversion": (SCBCEWithLogitsLoss.soft_inversion, 0.2, 0.2, 1.5, "sample", 0.0),
    "moderation": (SCBCEWithLogitsLoss.moderation, 0.2, 0.2, 1.0, "sample", 0.0),
    "dynamic_moderation": (SCBCEWithLogitsLoss.dynamic_moderation, 0.2, 0.2, 1.0, "sample", 0.25),
}


@given(batches(), pairs(), st.sampled_from(["none", "mean", "sum"]))
def test_module_equals_function(batch, pair, reduction):
    if pair[0] * pair[1] > 0.99999:
        pair = (0.99 * pair[0], pair[1])  # at 1 it would teach nothing, and is refused
    criterion = SCBCEWithLogitsLoss(alpha=pair[0], beta=pair[1], reduction=reduction)
    want = sc_bce_with_logits(batch.input, batch.target, *pair, reduction=reduction)
    assert_close(criterion(batch.input, batch.target), want, rtol=0, atol=0)


@pytest.mark.parametrize("name", SETTINGS)
def test_named_settings_are_data(name):
    make, argument, alpha, beta, sampling, noise = SETTINGS[name]
    criterion = make(argument, reduction="sum", pos_weight=torch.tensor(2.0), ignore_index=255)
    assert criterion.alpha == pytest.approx(alpha)
    assert (criterion.beta, criterion.sampling, criterion.noise) == (beta, sampling, noise)
    assert (criterion.reduction, criterion.ignore_index) == ("sum", 255)
    x, y = torch.randn(4, 3).double(), torch.randint(0, 2, (4, 3))
    expected = make(
        argument, sampling="expected", noise=0.0, reduction="sum", pos_weight=torch.tensor(2.0)
    )
    want = ref.sc_bce(array(x), array(y), alpha, beta, pos_weight=2.0, reduction="sum")
    assert float(expected(x, y)) == pytest.approx(float(want))
    plain = ref.bce(array(x), array(y), 2.0).sum()
    assert float(criterion.eval()(x, y)) == pytest.approx(float(plain))


def test_named_settings_take_another_sampling():
    assert SCBCEWithLogitsLoss.disturb_label(0.2, sampling="sample").sampling == "sample"
    assert SCBCEWithLogitsLoss.disturb_label(0.2, "sample").sampling == "sample"
    assert SCBCEWithLogitsLoss.hard_inversion(0.2, sampling="element").sampling == "element"
    assert SCBCEWithLogitsLoss.label_smoothing(0.2, sampling="sample").sampling == "sample"


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.99])
def test_disturb_label_redraws_uniformly_among_two_classes(rate):
    # Redrawn with probability `rate`, a label is wrong half of that time.
    criterion = SCBCEWithLogitsLoss.disturb_label(rate)
    x = torch.ones(200_000, 1)
    flipped = criterion(x, torch.ones_like(x)) - math.log1p(math.exp(-1))
    assert float(flipped) == pytest.approx(rate / 2, abs=5 * 0.5 / math.sqrt(200_000))


@pytest.mark.parametrize("sampling", ["sample", "element"])
@pytest.mark.parametrize("name", [n for n in SETTINGS if n != "label_smoothing"])
def test_mean_of_draws_is_the_expectation(name, sampling):
    make, argument, alpha, beta, _, noise = SETTINGS[name]
    criterion = make(argument, sampling=sampling, reduction="none")
    n = 40_000
    x, y = torch.full((n, 2), 1.5), torch.tensor([0.0, 1.0]).expand(n, 2)
    drawn = criterion(x, y)
    expected = sc_bce_with_logits(x, y, alpha, beta, reduction="none")
    # The loss moves by x times the target; the target's variance is g (beta/2 - g) plus the
    # noise's, less than noise^2. Five standard errors of the mean of n draws.
    g = alpha * beta / 2
    error = 1.5 * math.sqrt((g * (beta / 2 - g) + noise**2) / n)
    assert ((drawn.mean(0) - expected.mean(0)).abs() < 5 * error).all()
    assert not torch.equal(drawn, expected)


def test_samples_are_drawn_whole_and_elements_alone():
    x, y = torch.ones(500, 40), torch.zeros(500, 40)
    for sampling, kinds in (("sample", {0, 40}), ("element", set(range(41)))):
        criterion = SCBCEWithLogitsLoss.hard_inversion(0.3, sampling=sampling, reduction="none")
        flipped = (criterion(x, y) < 1).sum(1)
        assert set(flipped.tolist()) <= kinds
        assert 0.25 < flipped.float().mean() / 40 < 0.35
    assert len(set(flipped.tolist())) > 5


def test_dynamic_moderation_scatters_labels_by_a_truncated_normal():
    criterion = SCBCEWithLogitsLoss.dynamic_moderation(0.9, reduction="none")
    x = torch.ones(110_000, 1)
    # The loss is softplus(x) - q x, hence q by subtraction; what was not drawn is still 0.
    q = math.log1p(math.e) - criterion(x, torch.zeros_like(x))
    noise = q[q > 0.1][:90_000] - 0.5
    assert len(noise) == 90_000
    assert noise.abs().max() <= 0.25 + 1e-6
    assert noise.abs().max() > 0.249
    # Moments of the standard normal truncated to +-0.25, by quadrature.
    grid = np.linspace(-0.25, 0.25, 10_001)
    density = np.exp(-(grid**2) / 2)
    variance = (grid**2 * density).sum() / density.sum()
    assert float(noise.var()) == pytest.approx(variance, rel=0.02)
    assert abs(float(noise.mean())) < 5 * math.sqrt(variance / 90_000)


@pytest.mark.parametrize("name", SETTINGS)
def test_eval_and_no_grad_are_plain_bce_and_draw_nothing(name):
    make, argument, *_ = SETTINGS[name]
    criterion = make(argument)
    x, y = torch.randn(6, 3), torch.rand(6, 3)
    want = F.binary_cross_entropy_with_logits(x, y)
    before = rng_state()
    with torch.no_grad():
        assert torch.equal(criterion(x, y), want)
    with torch.inference_mode():
        assert torch.equal(criterion(x, y), want)
    assert torch.equal(criterion.eval()(x, y), want)
    assert torch.equal(rng_state(), before)


def test_generator_decides_the_draws_and_spares_the_global_one():
    x, y = torch.randn(50, 3), torch.rand(50, 3)
    before = rng_state()
    runs = [SCBCEWithLogitsLoss.dynamic_moderation(0.5, generator=seeded(s)) for s in (1, 1, 2)]
    one, two, three = (run(x, y) for run in runs)
    assert torch.equal(one, two)
    assert not torch.equal(one, three)
    assert torch.equal(rng_state(), before)
    criterion = SCBCEWithLogitsLoss.hard_inversion(0.4)
    torch.manual_seed(5)
    first = criterion(x, y)
    torch.manual_seed(5)
    assert torch.equal(criterion(x, y), first)
    # A copy carries its own generator on.
    twin = copy.deepcopy(runs[0])
    assert torch.equal(twin(x, y), runs[0](x, y))


def test_nothing_is_drawn_at_alpha_zero():
    before = rng_state()
    SCBCEWithLogitsLoss(alpha=0.0, sampling="element")(torch.zeros(3), torch.ones(3))
    assert torch.equal(rng_state(), before)


def test_small_probabilities_are_drawn_in_float32_whatever_the_input():
    # A bfloat16 uniform has 256 values: 0.001 would be drawn as 0 or 1/256.
    criterion = SCBCEWithLogitsLoss.hard_inversion(0.001, sampling="element", reduction="none")
    x = torch.ones(2_000_000, 1, dtype=torch.bfloat16)
    flipped = (criterion(x, torch.zeros_like(x)) < 1).float().mean()
    assert float(flipped) == pytest.approx(0.001, abs=5 * math.sqrt(0.001 / 2_000_000))


def test_scalars_and_empty_batches_can_be_drawn():
    for sampling in ("sample", "element"):
        criterion = SCBCEWithLogitsLoss.hard_inversion(0.4, sampling=sampling)
        losses = {
            round(float(criterion(torch.tensor(1.0), torch.tensor(1.0))), 4) for _ in range(40)
        }
        assert losses == {0.3133, 1.3133}
        assert criterion(torch.empty(0, 2), torch.empty(0, 2)).isnan()


@pytest.mark.parametrize("sampling", ["sample", "element"])
def test_compile_draws_without_a_generator_in_one_graph(sampling):
    criterion = SCBCEWithLogitsLoss.dynamic_moderation(0.5, sampling=sampling)
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    x, y = torch.randn(2000, 3), torch.rand(2000, 3)
    one, two = compiled(x, y), compiled(x, y)
    assert not torch.equal(one, two)
    assert_close(one, sc_bce_with_logits(x, y, 0.5, 1.0), rtol=0.1, atol=0)


def test_compile_with_a_generator_draws_outside_the_graph():
    x, y = torch.randn(50, 3), torch.rand(50, 3)
    make = SCBCEWithLogitsLoss.hard_inversion
    eager = make(0.4, generator=seeded(1))
    compiled = torch.compile(make(0.4, generator=seeded(1)), backend="aot_eager")
    for _ in range(2):
        assert_close(compiled(x, y), eager(x, y))


def test_numpy_numbers_configure_a_loss_that_compiles():
    criterion = SCBCEWithLogitsLoss(
        alpha=np.float32(0.25), beta=np.float64(1.0), ignore_index=np.int64(255)
    )
    x, y = torch.randn(4, 3), torch.randint(0, 2, (4, 3))
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x, y), sc_bce_with_logits(x, y, 0.25, 1.0))


WRONG = {
    "0/255": lambda y: (255 * y).byte(), "0.0/255.0": lambda y: 255.0 * y,
    "-1/1": lambda y: 2 * y - 1, "1/2": lambda y: (y + 1).long(),
}  # fmt: skip


@pytest.mark.cpu_only("an accelerator would wait for a look at the values")
@pytest.mark.parametrize("ignored", [None, 7, math.nan])
@pytest.mark.parametrize("size", [60, 5000, (1 << 20) + 3])
@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize(
    "setting",
    [{}, {"alpha": 0.1}, {"alpha": 0.1, "sampling": "element"}, {"weight": torch.ones(())},
     {"alpha": 0.1, "pos_weight": torch.tensor(2.0)}],
)  # fmt: skip
def test_wrong_labels_are_refused_in_every_batch(setting, kind, size, ignored):
    """At alpha 0 too, after many good batches, in evaluation and without gradients."""
    x, y = torch.zeros(size), torch.ones(size)
    y[0] = 0
    wrong = WRONG[kind](y)
    criterion = SCBCEWithLogitsLoss(**setting, ignore_index=ignored)
    for _ in range(1 if size > 5000 else 6):
        criterion(x, y)
    text = r"`target` to .* got the value (255|-1|2); for a 0/255 mask pass `mask > 0`"
    with pytest.raises(ValueError, match=text):
        criterion(x, wrong)
    with torch.no_grad(), pytest.raises(ValueError, match=text):
        criterion(x, wrong)
    criterion.eval()
    with pytest.raises(ValueError, match=text):
        criterion(x, wrong)


@pytest.mark.parametrize("sampling", ["expected", "sample", "element"])
@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_missing_labels_count_nowhere(alpha, sampling):
    criterion = SCBCEWithLogitsLoss(alpha=alpha, sampling=sampling, ignore_index=math.nan)
    x = torch.tensor([1.0, math.inf, -2.0, math.nan], requires_grad=True)
    y = torch.tensor([1.0, math.nan, 0.0, math.nan])
    loss = criterion(x, y)
    loss.backward()
    assert loss.isfinite()
    assert x.grad[[1, 3]].tolist() == [0.0, 0.0]
    assert bool(x.grad[[0, 2]].ne(0).all())
    plain = criterion.eval()(x, y)
    want = F.binary_cross_entropy_with_logits(torch.tensor([1.0, -2.0]), torch.tensor([1.0, 0.0]))
    assert_close(plain.detach(), want)
    assert "ignore_index=nan" in repr(criterion)


@pytest.mark.parametrize("alpha", [0.0, 0.1])
@pytest.mark.parametrize("name", ["weight", "pos_weight"])
def test_a_weight_per_label_does_not_lie_along_the_width(name, alpha):
    x, y = torch.randn(2, 5, 4, 5), torch.rand(2, 5, 4, 5)
    criterion = SCBCEWithLogitsLoss(alpha=alpha, **{name: torch.ones(5)})
    text = rf"`{name}` to have one value per label, .*pass `{name}.reshape\(-1, 1, 1\)`"
    with pytest.raises(ValueError, match=text):
        criterion(x, y)
    with pytest.raises(ValueError, match=text):
        criterion.eval()(x, y)


def test_alpha_is_checked_when_it_is_assigned():
    criterion = SCBCEWithLogitsLoss(alpha=0.1)
    criterion.alpha = 0.3
    x, y = torch.randn(4, 2), torch.rand(4, 2)
    assert torch.equal(criterion(x, y), sc_bce_with_logits(x, y, 0.3))
    assert_close(criterion.flip_rates, (torch.tensor(0.3), torch.tensor(0.3)))
    assert repr(criterion).startswith("SCBCEWithLogitsLoss(alpha=0.3, ")
    for wrong, kind, text in (
        (1.5, ValueError, r"`alpha` to be in \[0, 1\], but got 1.5"),
        (math.nan, ValueError, "but got nan"),
        ("0.1", TypeError, "`alpha` to be a number"),
        (None, TypeError, "but got None"),
        (torch.tensor(0.1), TypeError, "but got Tensor"),
        (0.5, ValueError, r"alpha \* beta = 1, which loses the order of the labels"),
        (0.7, ValueError, r"alpha \* beta = 1.4, which loses"),
    ):
        with pytest.raises(kind, match=text):
            criterion.alpha = wrong
        assert criterion.alpha == 0.3
    criterion.alpha = 0
    assert torch.equal(criterion(x, y), F.binary_cross_entropy_with_logits(x, y))


@pytest.mark.cpu_only("an accelerator would wait for the weight")
def test_an_alpha_that_takes_every_answer_to_one_side_is_not_assigned():
    criterion = SCBCEWithLogitsLoss.label_smoothing(0.1, pos_weight=torch.tensor(5.0))
    criterion.beta = 0.5
    with pytest.raises(ValueError, match=r"a sure negative .* odds 1.67 and is called positive"):
        criterion.alpha = 1.0
    assert criterion.alpha == 1.0  # as it was
    criterion.alpha = 0.2
    rare = SCBCEWithLogitsLoss(alpha=0.1, beta=1.0, prior=0.02)
    with pytest.raises(ValueError, match=r"a sure positive .* is called negative"):
        rare.alpha = 0.6
    assert rare.alpha == 0.1


# --- what is passed as logits ------------------------------------------------------------------


def scores(kind, size=60):
    """Scores of a kind, in a batch of this size."""
    rng = np.random.default_rng(3)
    z = torch.from_numpy(rng.normal(0, 3, (size, 1))).float()
    return {
        "sigmoid": lambda: z.sigmoid(),
        "rare": lambda: (z - 6).sigmoid(),
        "certain": lambda: (z + 6).sigmoid(),
        "0 and 1": lambda: (z > 0).float(),
        "log-softmax": lambda: torch.cat((z, -z), 1).log_softmax(1),
        "logits": lambda: z,
        "untrained": lambda: 0.5 + 0.01 * z,  # a heap within [0, 1], clear of both ends
        "constant": lambda: torch.full_like(z, 0.3),
        "zero": lambda: torch.zeros_like(z),
        "nearly constant": lambda: 0.3 + 1e-5 * z,
        "negative": lambda: -z.abs(),
    }[kind]()


PROBABLE = ["sigmoid", "rare", "certain", "0 and 1"]
HONEST = ["logits", "untrained", "constant", "zero", "nearly constant", "negative"]


def said(x, **options):
    """Texts of the warnings of one training batch."""
    criterion = SCBCEWithLogitsLoss(**options)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        criterion(x.requires_grad_(), torch.ones_like(x).detach())
    return [str(warning.message) for warning in seen]


@pytest.mark.cpu_only("an accelerator would wait for a look at the values")
@pytest.mark.parametrize("alpha", [0.0, 0.1])
@pytest.mark.parametrize("kind", PROBABLE)
def test_probabilities_in_place_of_logits_are_noticed(kind, alpha):
    (text,) = said(scores(kind), alpha=alpha)
    assert text == (
        "all logits of a training batch look like probabilities; pass the raw output of the "
        "network, without a sigmoid or softmax"
    )
    assert len(said(scores(kind, 50))) == 1
    assert said(scores(kind, 49)) == []


@pytest.mark.cpu_only("an accelerator would wait for a look at the values")
def test_log_probabilities_in_place_of_logits_are_noticed():
    (text,) = said(scores("log-softmax", 25))
    assert "look like log-probabilities" in text
    assert said(scores("log-softmax", 24)) == []


@pytest.mark.parametrize("alpha", [0.0, 0.1])
@pytest.mark.parametrize("kind", HONEST)
def test_honest_logits_are_not_taken_for_probabilities(kind, alpha):
    assert said(scores(kind), alpha=alpha) == []


@pytest.mark.cpu_only("an accelerator would wait for a look at the values")
def test_probabilities_are_looked_for_in_training_and_in_the_first_batches():
    x, y = scores("sigmoid"), torch.ones(60, 1)
    criterion = SCBCEWithLogitsLoss(alpha=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.no_grad():
            criterion(x, y)
        criterion.eval()(x, y)
        criterion.train()
    with pytest.warns(UserWarning, match="look like probabilities"):
        criterion(x, y)
    for _ in range(10):  # logits, from then on
        criterion(scores("logits"), y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        criterion(x, y)


def test_the_functional_is_exempt_from_what_a_module_refuses():
    x, y = torch.zeros(2), torch.tensor([0.0, 1.0])
    loss = sc_bce_with_logits(x, y, 1.0, 1.0, pos_weight=torch.tensor(50.0))
    assert float(loss) == pytest.approx((0.5 * 50 + 0.5) * math.log(2))


def test_a_subclass_may_name_its_arguments():
    class Own(SCBCEWithLogitsLoss):
        def __init__(self, label_smoothing):
            super().__init__(alpha=1.0, beta=label_smoothing)

    x, y = torch.randn(3), torch.rand(3)
    assert torch.equal(Own(label_smoothing=0.1)(x, y), sc_bce_with_logits(x, y, 1.0, 0.1))


@pytest.mark.parametrize("sampling", ["sample", "element"])
def test_a_refused_batch_draws_nothing(sampling):
    criterion = SCBCEWithLogitsLoss.hard_inversion(0.3, sampling=sampling)
    before = rng_state()
    with pytest.raises(ValueError, match="size of `input`"):
        criterion(torch.zeros(3), torch.ones(2))
    with pytest.raises(TypeError, match="but got list"):
        criterion([1.0], torch.ones(1))
    assert torch.equal(rng_state(), before)


def test_repr_shows_the_numbers():
    assert repr(SCBCEWithLogitsLoss.dynamic_moderation(0.25, ignore_index=255)) == (
        "SCBCEWithLogitsLoss(alpha=0.25, beta=1.0, prior=0.5, sampling='sample', noise=0.25, "
        "ignore_index=255, reduction='mean')"
    )


# --- transforms: draws of any size, where values are not there to be read ----------------------


DRAWN = [
    lambda sampling: SCBCEWithLogitsLoss.hard_inversion(0.4, sampling=sampling),
    lambda sampling: SCBCEWithLogitsLoss.moderation(0.2, prior=0.02, sampling=sampling),
    lambda sampling: SCBCEWithLogitsLoss.dynamic_moderation(0.4, sampling=sampling),
]
drawing = pytest.mark.parametrize("sampling", ["sample", "element"])
kinds = pytest.mark.parametrize("make", DRAWN, ids=["flip", "moderate", "noise"])


@pytest.mark.not_on("xla", "make_fx takes what it draws for constants")
@drawing
@kinds
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_records_the_draw(sampling, make, mode):
    criterion = make(sampling)
    x, y = torch.randn(5000, 2), torch.rand(5000, 2)
    traced = make_fx(lambda x, y: criterion(x, y), tracing_mode=mode)(x, y)
    one, two = traced(x, y), traced(x, y)
    assert not torch.equal(one, two)
    want = sc_bce_with_logits(x, y, criterion.alpha, criterion.beta, prior=criterion.prior)
    assert_close(one, want, rtol=0.1, atol=0)


@drawing
@kinds
def test_fake_tensors_can_be_drawn(sampling, make):
    criterion = make(sampling)
    with FakeTensorMode() as mode:
        x = mode.from_tensor(torch.randn(5000, 2, dtype=torch.bfloat16)).requires_grad_()
        for y in (torch.rand(5000, 2), torch.ones(5000, 2, dtype=torch.int64)):
            loss = criterion(x, y.to(x.dtype) if y.is_floating_point() else y)
            loss.backward()
            assert (loss.shape, loss.dtype) == ((), torch.bfloat16)
            assert x.grad.shape == x.shape
        # A subclass makes its random numbers itself, in float32 too.
        assert truncated_normal(x, 0.25, None).dtype == torch.float32


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@lacks((2, 9), "has no BCE of distributed tensors")
@pytest.mark.filterwarnings("ignore:DTensor random operators:UserWarning")  # torch, of a CPU
@pytest.mark.parametrize("sampling", ["expected", "sample", "element"])
def test_distributed_tensors_can_be_drawn(sampling, mesh):
    x, y = torch.randn(5000, 2), torch.rand(5000, 2)
    criterion = SCBCEWithLogitsLoss(alpha=0.4, sampling=sampling)
    shards = distribute_tensor(x, mesh, [Shard(0)]).requires_grad_()
    loss = criterion(shards, distribute_tensor(y, mesh, [Shard(0)]))
    loss.backward()
    assert isinstance(loss, DTensor)
    want = sc_bce_with_logits(x, y, 0.4)
    assert_close(loss.full_tensor(), want, rtol=1e-6 if sampling == "expected" else 0.1, atol=0)
    towards = shards.grad.full_tensor() * x.numel() - torch.sigmoid(x) + y
    flips = (2 * y - 1 - towards).abs() < 1e-4
    if sampling != "expected":
        assert bool((flips | (towards.abs() < 1e-4)).all())
        assert flips.float().mean() == pytest.approx(0.4, abs=0.05)
        whole = bool((flips[:, 0] == flips[:, 1]).all())
        assert whole == (sampling == "sample")


@drawing
@kinds
def test_export_with_a_dynamic_batch(sampling, make):
    criterion = make(sampling)
    n = torch.export.Dim("n", min=2, max=1 << 20)
    x, y = torch.randn(8, 3), torch.rand(8, 3)
    exported = torch.export.export(criterion, (x, y), dynamic_shapes=({0: n}, {0: n}))
    for size in (2, 8, 5000, 200_000):
        x, y = torch.randn(size, 3), torch.rand(size, 3)
        loss = exported.module()(x, y)
        assert loss.shape == ()
        if size > 4000:
            want = sc_bce_with_logits(x, y, criterion.alpha, criterion.beta, prior=criterion.prior)
            assert_close(loss, want, rtol=0.1, atol=0)


@drawing
def test_compile_does_not_repeat_by_size(sampling):
    criterion = SCBCEWithLogitsLoss.hard_inversion(0.4, sampling=sampling)
    count = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(criterion, fullgraph=True, backend=count, dynamic=True)
    for size in (8, 4095, 4097, 100_000):
        compiled(torch.randn(size, 3), torch.rand(size, 3))
    assert count.frame_count == 1


def test_compile_does_not_repeat_for_batches_seen_without_it():
    criterion = SCBCEWithLogitsLoss(alpha=0.1)
    count = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(criterion, fullgraph=True, backend=count)
    x, y = torch.randn(4, 3), torch.rand(4, 3)
    for _ in range(6):
        compiled(x, y)
        criterion(x, y)
    assert count.frame_count == 1


# --- configuration -----------------------------------------------------------------------------


@pytest.mark.cpu_only("it sets default devices itself")
def test_a_loss_can_be_built_on_any_default_device():
    with torch.device("meta"):
        criterion = SCBCEWithLogitsLoss.moderation(0.2, prior=0.02)
        held = SCBCEWithLogitsLoss(alpha=0.2, prior=torch.full((3,), 0.1))
    assert_close(criterion.flip_rates, (torch.tensor(0.004), torch.tensor(0.196)))
    assert held.prior.is_meta
    assert held.flip_rates[0].is_meta


LOSS = SCBCEWithLogitsLoss
ERRORS = [
    (lambda: LOSS(alpha=1.1), ValueError, r"`alpha` to be in \[0, 1\], but got 1.1"),
    (lambda: LOSS(alpha=math.nan), ValueError, "`alpha` .* but got nan"),
    (lambda: LOSS.hard_inversion(0.1, beta=1.0), TypeError, "SCBCEWithLogitsLoss.*'beta'"),
    (lambda: LOSS.hard_inversion(0.1, setting=1), TypeError, "unexpected keyword.*'setting'"),
    (lambda: LOSS(beta=-1), ValueError, r"`beta` to be in \[0, 2\], but got -1"),
    (lambda: LOSS(alpha=torch.tensor(0.1)), TypeError, "`alpha` to be a number"),
    (lambda: LOSS(alpha=0.7), ValueError, r"0.7 \* 2.0 > 1"),
    (lambda: LOSS(alpha=0.7, sampling="sample"), ValueError, r"0.7 \* 2.0 > 1"),
    (lambda: LOSS(reduction="avg"), ValueError, "'none', 'mean', 'sum', but got 'avg'"),
    (lambda: LOSS(sampling="batch"), ValueError, "'expected', 'sample', 'element', but got 'bat"),
    (lambda: LOSS(noise=0.1, beta=1.0), ValueError, "has no noise, so drop `noise`"),
    (lambda: LOSS(noise=0.6, beta=1.0, sampling="sample"), ValueError, r"in \[0, 0.5\], but"),
    (lambda: LOSS(noise=0.1, sampling="sample"), ValueError, r"`noise` to be in \[0, 0\]"),
    (lambda: LOSS(noise="much"), TypeError, "`noise` to be a number"),
    (lambda: LOSS(ignore_index=[255]), TypeError, "`ignore_index` to be an int"),
    (lambda: LOSS.label_smoothing(1.2), ValueError, r"`eps` to be in \[0, 1\], but got 1.2"),
    (lambda: LOSS.disturb_label(-0.1), ValueError, r"`rate` to be in \[0, 1\], but got -0.1"),
    (lambda: LOSS.hard_inversion(0.6), ValueError, r"0.6 \* 2.0 > 1"),
    # What teaches nothing.
    (lambda: LOSS.label_smoothing(1.0), ValueError, r"below 1 / beta, but got alpha \* beta = 1"),
    (lambda: LOSS.hard_inversion(0.5), ValueError, r"= 1, which loses the order of the labels; lo"),
    (lambda: LOSS.disturb_label(1.0), ValueError, r"alpha \* beta = 1, which loses"),
    (lambda: LOSS.moderation(1.0), ValueError, r"alpha \* beta = 1, which loses"),
    (lambda: LOSS(alpha=0.5), ValueError, r"alpha \* beta = 1, which loses"),
    (lambda: LOSS(alpha=1.0, beta=1.0, prior=0.02), ValueError, r"alpha \* beta = 1, which loses"),
    (lambda: LOSS(alpha=1.0, prior=torch.tensor([0.0, 0.5])), ValueError, r"alpha \* beta = 2"),
    # What takes every answer to one side.
    (
        lambda: LOSS.label_smoothing(0.1, pos_weight=torch.tensor(50.0)),
        ValueError,
        r"`alpha` to leave a sure negative on its side of 1/2, but got alpha=1 and "
        r"beta=0.1, with which its best answer, with the prior and pos_weight, has odds 2.63 and "
        r"is called positive; lower alpha or pos_weight, or set `prior` to the base rate of the "
        r"positives",
    ),
    (
        lambda: LOSS.moderation(0.6, prior=0.02),
        ValueError,
        r"`alpha` to leave a sure positive on its side of 1/2, but got alpha=0.6 and "
        r"beta=1.0, with which .* has odds 0.701 and is called negative",
    ),
    (
        lambda: LOSS(alpha=0.3, prior=torch.tensor([0.3, 0.9]), pos_weight=torch.tensor([1.0, 4])),
        ValueError,
        r"a sure negative .* odds 1.71",
    ),
    (
        lambda: LOSS(alpha=0.3, prior=torch.full((900,), 0.3), pos_weight=torch.full((900,), 9.0)),
        ValueError,
        r"a sure negative .* got alpha=0.3 and beta=None, with which .* has odds 1.33",
    ),
    (
        lambda: LOSS.hard_inversion(0.1, prior=torch.full((900,), 0.3)),
        ValueError,
        r"is defined by, but got a tensor of shape \(900,\); use moderation",
    ),
    (lambda: LOSS(prior=torch.linspace(0, 2, 900)), ValueError, r"1\], but got the value 2$"),
    # What other losses call by these names.
    (
        lambda: LOSS(0.1),
        TypeError,
        r"`weight` to be a Tensor or None, but got 0.1 \(float\); for label smoothing write "
        r"`SCBCEWithLogitsLoss.label_smoothing\(0.1\)`",
    ),
    (lambda: LOSS(pos_weight=50.0), TypeError, r"`pos_weight` .* pass `torch.tensor\(50.0\)`"),
    (lambda: LOSS(smoothing=0.1), TypeError, r"unexpected keyword argument 'smoothing'"),
    (lambda: LOSS.soft_inversion(0.7), ValueError, r"0.7 \* 1.5 > 1"),
    (lambda: LOSS.dynamic_moderation(0.1, sampling="expected"), ValueError, "no noise"),
]


@pytest.mark.parametrize(("make", "kind", "text"), ERRORS, ids=range(len(ERRORS)))
def test_bad_configuration_is_refused_at_construction(make, kind, text):
    """What a tensor holds is looked at on a CPU only."""
    values = "the value|sure negative|beta = 2"
    refused(kind, text, make, values)


def test_a_prior_follows_the_device_and_no_cast():
    prior = torch.tensor([0.02, 0.3])
    criterion = LOSS.moderation(0.2, prior=prior)
    assert torch.equal(criterion.half().prior, prior)
    assert criterion.to("meta").prior.is_meta
    assert torch.equal(criterion.to_empty(device="cpu").prior, prior)
    assert not criterion.state_dict()
