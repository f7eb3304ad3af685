"""A repair appended to an ONNX model. Needs `pip install onnx onnxruntime`."""

from __future__ import annotations

import copy
import io
import os
import warnings
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor

from .._errors import describe, refuse
from ..repair import IsotonicCalibration, TemperatureScaling

try:
    import onnx
    from onnx import version_converter
except ImportError as error:
    raise ImportError("append needs: pip install onnx") from error

__all__ = ["append", "check"]

Repair = IsotonicCalibration | TemperatureScaling

_OLDEST, _NEWEST = 11, 17  # opsets that torch writes; newer ones are converted to
_DTYPES: dict[int, torch.dtype] = {
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.FLOAT16: torch.float16,
    onnx.TensorProto.DOUBLE: torch.float64,
}
_ENDS = ("Sigmoid", "HardSigmoid", "Softmax")
_SHAPES = ("Identity", "Reshape", "Squeeze", "Unsqueeze", "Transpose", "Flatten", "Cast", "Slice")
_SIZES = (64, 224, 1)  # of a dimension without a number, when a model is run
_UNITS = 8  # of the precision by which two runtimes may differ


def append(
    model: onnx.ModelProto | str | os.PathLike[str], repair: Repair, *, output: str | None = None
) -> onnx.ModelProto:
    """Return an ONNX model with a fitted repair behind one of its outputs.

    The repaired output takes the name, type and axes of the old one, and everything else stays as
    it is: opset, inputs, other outputs, what is computed from the raw output inside the model.
    The raw output is no output any more.

    Args:
        model: a model or the path of one, of opset 11 or newer. It is not changed.
        repair: a fitted :class:`IsotonicCalibration` or :class:`TemperatureScaling`. Fitted to
            logits it belongs behind logits, fitted to probabilities behind a sigmoid. With
            ``num_labels``, dimension 1 of the output holds the labels.
        output: name of the output. Default: None, the only one.

    Raises:
        ValueError: the repair is not fitted, or takes logits where the model ends in a sigmoid;
            no output has this name, or there are several and none is named; the output has another
            number of labels, no known rank, or is not float16, float32 or float64; the opset is
            too old.
        TypeError: ``repair`` is something else.
        ImportError: at import, if onnx is not installed.

    Note:
        :func:`check` runs both models. A float16 output is repaired in float32 and rounded.

    Example:
        >>> import onnx, torch
        >>> from onnx import helper
        >>> from sc_bce import TemperatureScaling
        >>> from sc_bce.integrations.onnx import append, check
        >>> kind, axes = onnx.TensorProto.FLOAT, ["batch", 1]
        >>> ends = [helper.make_tensor_value_info(name, kind, axes) for name in ("x", "logit")]
        >>> node = helper.make_node("Mul", ["x", "x"], ["logit"])
        >>> graph = helper.make_graph([node], "network", ends[:1], ends[1:])
        >>> model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
        >>> z = torch.randn(1000)
        >>> repair = TemperatureScaling().fit(3 * z, torch.rand(1000) < torch.sigmoid(z))
        >>> made = append(model, repair)
        >>> [one.name for one in made.graph.output]
        ['logit']
    """
    if not isinstance(repair, Repair):
        wanted = "be an IsotonicCalibration or a TemperatureScaling"
        refuse("repair", wanted, describe(repair), error=TypeError)
    if not bool(repair.fitted):
        refuse("repair", "be fitted", "one that is not", "call `repair.fit(logits, target)`")
    made = onnx.ModelProto()
    made.CopyFrom(_loaded(model))
    old = _output(made, output)
    kind = _DTYPES.get(old.type.tensor_type.elem_type)
    if kind is None:
        wanted = f"hold {', '.join(str(one) for one in _DTYPES.values())}"
        refuse("output", wanted, f"type {old.type.tensor_type.elem_type} of ONNX in {old.name!r}")
    rank, labels = _axes(made, old)
    if repair.num_labels is not None and (rank < 2 or labels not in (None, repair.num_labels)):
        wanted = f"have {repair.num_labels} labels in dimension 1, as the repair has"
        refuse("output", wanted, f"{old.name!r} with {labels if rank > 1 else 'one dimension'}")
    ends = _last_operator(made.graph, old.name)
    if repair.takes_logits and ends in _ENDS:
        remedy = "fit it with `from_logits=False`, or name the output that holds the logits"
        refuse("repair", "take what the model answers", f"one for logits behind {ends}", remedy)
    part = _exported(repair, kind, rank, _opset(made))
    _join(made, old.name, part)
    return made


def check(
    model: onnx.ModelProto | str | os.PathLike[str], made: onnx.ModelProto, repair: Repair, *,
    output: str | None = None,
) -> float:  # fmt: skip
    """Run a model and what :func:`append` made of it in onnxruntime, on random input.

    Args:
        model: what :func:`append` got.
        made: what it returned.
        repair: as for :func:`append`.
        output: as for :func:`append`. Default: None.

    Returns:
        The largest difference of the repaired probability to that of ``repair`` in torch, beyond
        what the last digit of the raw output explains.

    Raises:
        ValueError: the answers differ by more than rounding; the model doesn't run on random
            input; the repair takes probabilities and the model answers something else.
        ImportError: onnxruntime is not installed.

    Example:
        >>> import torch
        >>> from onnx import helper
        >>> from sc_bce import TemperatureScaling
        >>> from sc_bce.integrations.onnx import append, check
        >>> ends = [helper.make_tensor_value_info(name, 1, ["batch"]) for name in ("x", "logit")]
        >>> node = helper.make_node("Mul", ["x", "x"], ["logit"])
        >>> graph = helper.make_graph([node], "network", ends[:1], ends[1:])
        >>> opset = helper.make_opsetid("", 17)
        >>> model = helper.make_model(graph, opset_imports=[opset], ir_version=8)
        >>> z = torch.randn(1000)
        >>> repair = TemperatureScaling(bias=True).fit(z, torch.rand(1000) < torch.sigmoid(z))
        >>> check(model, append(model, repair), repair) < 1e-6
        True
    """
    old = _output(_loaded(model), output).name
    raw, fed = _run(_loaded(model), old)
    repaired, _ = _run(made, old, fed)
    # Repairs rise: between their answers to the neighbours of the raw output lies theirs to it, on
    # whichever side of a step, and of a float16 that onnxruntime did not round, it falls.
    x = raw.to(torch.promote_types(raw.dtype, torch.float32))
    eps = torch.finfo(raw.dtype).eps
    spread = 2 * eps * x.abs()
    if isinstance(repair, IsotonicCalibration):  # whose steps are places in the probability
        steep = (x.sigmoid() * (-x).sigmoid()).clamp(min=1e-4) if repair.takes_logits else 1.0
        spread += 2 * eps / steep
    ends: Any = (x - spread, x + spread)
    if not repair.takes_logits:  # which refuses what `x` has beyond 0 and 1
        ends = (end.clamp(min(0.0, float(x.min())), max(1.0, float(x.max()))) for end in ends)
    with torch.no_grad():
        low, high = map(repair, ends)
    # Where a flip is removed, rounding grows a thousandfold in the logits that are near the clip.
    # Their probability, which is what counts, hardly moves.
    same = _beyond(low, repaired, high) <= 1000 * _UNITS * eps * (1 + repaired.abs())
    if repair.takes_logits:
        low, repaired, high = (one.sigmoid() for one in (low, repaired, high))
    beyond = _beyond(low, repaired, high)
    if not bool((same & (beyond <= _UNITS * eps)).all()):
        expected = "answer as the repair does in torch"
        refuse("made", expected, f"a difference of {float(beyond.max()):.2g}")
    return float(beyond.max())


def _beyond(low: Tensor, value: Tensor, high: Tensor) -> Tensor:
    """How far a value lies outside of an interval."""
    return torch.maximum(low - value, value - high).clamp(min=0)


def _loaded(model: onnx.ModelProto | str | os.PathLike[str]) -> onnx.ModelProto:
    return model if isinstance(model, onnx.ModelProto) else onnx.load(os.fspath(model))


def _output(model: onnx.ModelProto, name: str | None) -> onnx.ValueInfoProto:
    outputs: dict[str | None, onnx.ValueInfoProto] = {one.name: one for one in model.graph.output}
    if name is None and len(outputs) == 1:
        return next(iter(outputs.values()))
    if name not in outputs:
        wanted = f"be one of {', '.join(map(repr, outputs))}"
        refuse("output", wanted, repr(name), "name the one to be repaired")
    return outputs[name]


def _axes(model: onnx.ModelProto, value: onnx.ValueInfoProto) -> tuple[int, int | None]:
    """Number of dimensions, and the size of dimension 1 if it is known."""
    kind = value.type.tensor_type
    if not kind.HasField("shape"):
        inferred = onnx.shape_inference.infer_shapes(model)
        kind = _output(inferred, value.name).type.tensor_type
    if not kind.HasField("shape"):
        refuse("output", "have a known number of dimensions", f"none in {value.name!r}")
    dims = kind.shape.dim
    known = len(dims) > 1 and dims[1].HasField("dim_value")
    return len(dims), dims[1].dim_value if known else None


def _last_operator(graph: onnx.GraphProto, name: str) -> str:
    """What computes an output, but for changes of its shape."""
    producers = {made: node for node in graph.node for made in node.output}
    if name not in producers:
        refuse("output", "be computed by the model", f"{name!r}, an input or a constant")
    node = producers[name]
    while node.op_type in _SHAPES and node.input[0] in producers:
        node = producers[node.input[0]]
    return str(node.op_type)


def _opset(model: onnx.ModelProto) -> int:
    version = next((one.version for one in model.opset_import if one.domain in ("", "ai.onnx")), 0)
    if version < _OLDEST:
        remedy = "convert it with `onnx.version_converter`"
        refuse("model", f"have opset {_OLDEST} or newer", f"opset {version}", remedy)
    return int(version)


def _exported(repair: Repair, dtype: torch.dtype, rank: int, opset: int) -> onnx.GraphProto:
    """The repair alone, in the opset of the model."""
    size = [2, repair.num_labels or 3, 4, 5, 6, 7, 8][:rank]
    example, file = (torch.full(size, 0.5, dtype=dtype, device="cpu"),), cast(Any, io.BytesIO())
    # The tracer, which writes any opset; torch.export's knows only the newest.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            copy.deepcopy(repair).cpu().eval(), example, file, dynamo=False, input_names=["x"],
            output_names=["y"], opset_version=min(opset, _NEWEST),
            dynamic_axes={name: list(range(rank)) for name in "xy"},
        )  # fmt: skip
    part = onnx.load_from_string(file.getvalue())
    if opset > _NEWEST:
        part = version_converter.convert_version(part, opset)
    return part.graph


def _join(model: onnx.ModelProto, name: str, part: onnx.GraphProto) -> None:
    """The nodes of the repair behind an output, whose name they take over."""
    graph = model.graph
    taken = {one for node in _nodes(graph) for one in (node.name, *node.input, *node.output)}
    taken |= {one.name for one in (*graph.input, *graph.output, *graph.initializer)}
    raw, prefix, tries = f"{name}_uncalibrated", "calibration/", 1
    while raw in taken or any(one.startswith(prefix) for one in taken):
        tries += 1
        raw, prefix = f"{name}_uncalibrated_{tries}", f"calibration_{tries}/"
    for node in _nodes(graph):
        for names in (node.input, node.output):
            names[:] = [raw if one == name else one for one in names]
    for note in graph.quantization_annotation:
        note.tensor_name = raw if note.tensor_name == name else note.tensor_name
    ends = {"": "", part.input[0].name: raw, part.output[0].name: name}
    for node in _nodes(part):
        node.name = prefix + node.name
        for names in (node.input, node.output):
            names[:] = [ends.get(one, prefix + one) for one in names]
    for value in part.initializer:
        value.name = prefix + value.name
    graph.node.extend(part.node)
    graph.initializer.extend(part.initializer)


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The nodes of a graph, and of the graphs inside them."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes(inner)


def _run(model: onnx.ModelProto, name: str, fed: Any = None) -> tuple[Tensor, Any]:
    """One output of a model, and the input that it answers."""
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError("check needs: pip install onnxruntime") from error
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4  # what fails here is said below
    # Each operator as it is: fused, float16 would not be rounded before the repair.
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), settings, providers=["CPUExecutionProvider"]
    )
    problem = ""
    for size in _SIZES:
        feed = fed or {one.name: _random(one, size) for one in session.get_inputs()}
        try:
            return torch.from_numpy(session.run([name], feed)[0]), feed
        except Exception as error:  # onnxruntime's own
            problem = str(error)
    refuse("model", "run on random input", f"an error of onnxruntime ({problem})")


def _random(value: Any, size: int) -> Any:
    kinds = {"double": torch.float64, "float16": torch.float16, "float": torch.float32}
    shape = [n if isinstance(n, int) else 2 if axis == 0 else size
             for axis, n in enumerate(value.shape)]  # fmt: skip
    generator = torch.Generator("cpu").manual_seed(0)
    kind = value.type.removeprefix("tensor(").removesuffix(")")
    if kind in kinds:
        return torch.randn(shape, generator=generator, device="cpu").to(kinds[kind]).numpy()
    whole = torch.randint(2, shape, generator=generator, device="cpu").numpy()
    return whole.astype({"uint8": "uint8", "int32": "int32", "bool": "bool"}.get(kind, "int64"))
