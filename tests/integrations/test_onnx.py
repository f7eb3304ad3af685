"""A repair behind the output of somebody's ONNX model: the names, opset and axes stay."""

import importlib.util
import io
import warnings

import pytest
import torch
from torch import nn

from sc_bce import IsotonicCalibration, TemperatureScaling

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")

from sc_bce.integrations.onnx import append, check  # noqa: E402

BUILDS = {
    "temperature": TemperatureScaling,
    "affine": lambda **kept: TemperatureScaling((0.05, 0.1), bias=True, **kept),
    "isotonic": IsotonicCalibration,
}


def model(sigmoid=False, labels=1, opset=17, dtype=torch.float32, twice=False):
    """A convolution in ONNX, as torch's tracer writes it."""
    network = nn.Sequential(nn.Conv2d(3, labels, 3, padding=1), *[nn.Sigmoid()] * sigmoid)
    with torch.no_grad():
        network[0].weight.mul_(4)
    file, axes = io.BytesIO(), {0: "batch", 2: "height", 3: "width"}
    names = ["logits", "probabilities"] if twice else ["answer"]

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, x):
            return network(x), torch.sigmoid(network(x))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            (Both() if twice else network).to(dtype), (torch.randn(2, 3, 8, 8, dtype=dtype),), file,
            dynamo=False, opset_version=min(opset, 17), input_names=["image"], output_names=names,
            dynamic_axes={name: axes for name in ["image", *names]},
        )  # fmt: skip
    made = onnx.load_from_string(file.getvalue())
    return made if opset <= 17 else onnx.version_converter.convert_version(made, opset)


def repair(build="affine", from_logits=True, labels=None):
    z = 2 * torch.randn(40, labels or 1, 100)
    y = torch.rand(z.shape) < torch.sigmoid(z / 2)
    x = z if from_logits else z.sigmoid()
    return BUILDS[build](num_labels=labels).fit(x, y, from_logits=from_logits)


def answers(one, x):
    session = runtime.InferenceSession(one.SerializeToString())
    return [torch.from_numpy(y) for y in session.run(None, {"image": x.numpy()})]


def openvino(one, x):
    from openvino import Core

    core = Core()
    setting = {"INFERENCE_PRECISION_HINT": "f32"}  # else bfloat16 where the processor has it
    network = core.compile_model(core.read_model(one.SerializeToString()), "CPU", setting)
    return [torch.from_numpy(y.copy()) for y in network(x.numpy()).to_tuple()]


OTHERS = [openvino] * bool(importlib.util.find_spec("openvino"))


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("labels", [None, 3])
@pytest.mark.parametrize("sigmoid", [False, True])
def test_it_answers_as_torch_does_and_keeps_the_rest(build, labels, sigmoid):
    old, fitted = model(sigmoid, labels or 1), repair(build, not sigmoid, labels)
    before = old.SerializeToString()
    new = append(old, fitted)
    assert old.SerializeToString() == before
    assert new.opset_import == old.opset_import
    assert new.ir_version == old.ir_version
    assert new.graph.output == old.graph.output
    assert new.graph.input == old.graph.input
    onnx.checker.check_model(new)
    assert check(old, new, fitted) <= 1e-6
    x = torch.randn(5, 3, 20, 24)  # another size than the traced one
    for run in (answers, *OTHERS):
        (raw,), (got,) = run(old, x), run(new, x)
        wanted = fitted(raw)
        assert got.shape == wanted.shape
        assert not torch.equal(got, raw)
        apart = (got - wanted).abs() > 1e-4 * (1 + wanted.abs())
        if not sigmoid:  # the probabilities are what counts
            got, wanted = got.sigmoid(), wanted.sigmoid()
        # Where a flip is removed, the probability moves twenty times as fast as the raw one.
        apart |= (got - wanted).abs() > (3e-6 if build == "affine" else 1e-6)
        assert int(apart.sum()) <= (2 if build == "isotonic" else 0)  # on an edge of the curve


@pytest.mark.parametrize("seed", range(8))
def test_a_removed_flip_is_no_difference(seed):
    """Near the clip, rounding grows a thousandfold in the logits."""
    torch.manual_seed(seed)
    old, fitted = model(), repair()
    assert check(old, append(old, fitted), fitted) <= 1e-6


@pytest.mark.parametrize("opset", [11, 13, 18, 21])
def test_the_opset_is_kept(opset):
    old, fitted = model(opset=opset), repair("isotonic")
    new = append(old, fitted)
    assert {one.domain: one.version for one in new.opset_import}[""] == opset
    assert check(old, new, fitted) <= 1e-6


@pytest.mark.parametrize("build", BUILDS)
def test_float16_models(build):
    old, fitted = model(dtype=torch.float16), repair(build)
    new = append(old, fitted)
    assert check(old, new, fitted) <= 0.02
    (got,) = answers(new, torch.randn(2, 3, 16, 16).half())
    assert got.dtype == torch.float16


@pytest.mark.parametrize("from_logits", [True, False])
def test_the_side_of_a_step_is_no_difference(from_logits):
    """Where cells meet, two runtimes may round to either of them."""
    kind = onnx.TensorProto.FLOAT
    values = [onnx.helper.make_tensor_value_info(name, kind, [20_000]) for name in "xy"]
    fitted = repair("isotonic", from_logits)
    edges = torch.arange(1, 10_000, dtype=torch.float64) / 10_000 + 4.9e-7
    x = torch.cat((edges, edges + 1e-8)).float()
    x = torch.logit(x) if from_logits else x
    # The input is not used, so that the answers are at the edges.
    constant = onnx.numpy_helper.from_array(torch.nn.functional.pad(x, (0, 2), value=0.5).numpy())
    nodes = [
        onnx.helper.make_node("Constant", [], ["edges"], value=constant),
        onnx.helper.make_node("Mul", ["x", "zero"], ["nothing"]),
        onnx.helper.make_node("Add", ["nothing", "edges"], ["y"]),
    ]
    zero = onnx.helper.make_tensor("zero", kind, [], [0.0])
    graph = onnx.helper.make_graph(nodes, "edges", values[:1], values[1:], [zero])
    opset = [onnx.helper.make_opsetid("", 17)]
    old = onnx.helper.make_model(graph, opset_imports=opset, ir_version=8)
    assert check(old, append(old, fitted), fitted) <= 1e-6


def test_the_order_of_the_nodes_is_no_matter():
    """As converters leave them, and as onnxruntime takes them, a node can stand before another
    whose answer it needs."""
    old, fitted = model(sigmoid=True), repair(from_logits=False)
    nodes = list(old.graph.node)[::-1]
    del old.graph.node[:]
    old.graph.node.extend(nodes)
    assert check(old, append(old, fitted), fitted) <= 1e-6


def test_one_of_several_outputs_and_again(tmp_path):
    old, fitted = model(twice=True), repair("temperature")
    with pytest.raises(ValueError, match="be one of 'logits', 'probabilities', but got None"):
        append(old, fitted)
    onnx.save(old, tmp_path / "model.onnx")
    new = append(tmp_path / "model.onnx", fitted, output="logits")
    x = torch.randn(2, 3, 9, 9)
    (raw, probabilities), (first, same) = answers(old, x), answers(new, x)
    assert torch.equal(probabilities, same)
    torch.testing.assert_close(first, fitted(raw))
    (second, _) = answers(append(new, fitted, output="logits"), x)
    torch.testing.assert_close(second, fitted(fitted(raw)))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="one for logits behind Sigmoid; fit it with `from_logits"):
        append(model(sigmoid=True), repair())
    with pytest.raises(ValueError, match=r"have 3 labels in dimension 1.*'answer' with 2"):
        append(model(labels=2), repair(labels=3))
    with pytest.raises(ValueError, match="be fitted"):
        append(model(), TemperatureScaling())
    with pytest.raises(TypeError, match="be an IsotonicCalibration or a TemperatureScaling"):
        append(model(), nn.Sigmoid())
    with pytest.raises(ValueError, match="opset 11 or newer, but got opset 9"):
        append(model(opset=9), repair())
    old, other = model(), repair(from_logits=False)
    with pytest.raises(ValueError, match="hold probabilities in"):
        check(old, append(old, other), other)


def test_a_wrong_model_is_noticed():
    old, fitted, other = model(), repair("temperature"), repair("isotonic")
    with pytest.raises(ValueError, match="answer as the repair does in torch"):
        check(old, append(old, other), fitted)
