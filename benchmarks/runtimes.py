"""What becomes of a repaired network outside torch. As a script: the table of docs/guide/repair.md.

python -m benchmarks.runtimes [NAME ...]  # those that are installed, or those named

OpenCV 4 and 5, and packages that want another torch, need an environment each. onnxruntime-web is
looked for in ./node_modules (`npm install onnxruntime-web`).
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import logging
import math
import multiprocessing
import queue
import subprocess
import sys
import tempfile
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from sc_bce import IsotonicCalibration, TemperatureScaling

Answer = Callable[[Tensor], Any]  # of an exported module
Build = Callable[[nn.Module, Tensor, Path], Answer | None]  # None: it can't be run here
Repair = TemperatureScaling | IsotonicCalibration

SUBNORMAL, SMALLEST, LARGEST = 1e-45, 1.1754944e-38, 3.4028235e38
# nan, the infinities and zeros, and the numbers at which float32 ends or exp overflows.
SPECIAL = [
    math.nan, math.inf, -math.inf, 0.0, -0.0, SUBNORMAL, -SUBNORMAL, SMALLEST, -SMALLEST, LARGEST,
    -LARGEST, 89.0, -89.0,
]  # fmt: skip
# The same places of [0, 1]; nan is the only one that is not in it.
SPECIAL_P = [
    math.nan, 1.0, 0.0, 0.5, -0.0, SUBNORMAL, 1 - 2**-24, SMALLEST, 1e-30, 1 - 2**-12, 2**-12,
    1 - 1e-3, 1e-3,
]  # fmt: skip
BUILDS: dict[str, Callable[[], Repair]] = {
    "TemperatureScaling()": TemperatureScaling,
    "TemperatureScaling((.05, .1), bias=True)": lambda: TemperatureScaling((0.05, 0.1), bias=True),
    "IsotonicCalibration()": IsotonicCalibration,
}


def fitted(
    build: Callable[[], Repair], from_logits: bool = True, dtype: torch.dtype = torch.float32
) -> tuple[Repair, Tensor]:
    """A repair of a network that is twice too sure, and special inputs before ordinary ones."""
    generator = torch.Generator().manual_seed(0)
    truth = 2 * torch.randn(4000, generator=generator)
    target = torch.rand(4000, generator=generator) < torch.sigmoid(truth)
    input = 2 * truth if from_logits else torch.sigmoid(2 * truth)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a wrong flip rate is no matter here
        repair = build().fit(input, target, from_logits=from_logits).eval()
    x = torch.cat((torch.tensor(SPECIAL if from_logits else SPECIAL_P), input[:51]))
    return repair, x.to(dtype).reshape(1, 1, 4, 16)


def network() -> tuple[nn.Module, Tensor]:
    """A small network whose logits have a standard deviation of 4, and an image for it."""
    torch.manual_seed(0)
    first, last = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 1, 3, padding=1)
    # Names, since pnnx writes Python that can't hold numbers.
    model = nn.Sequential(OrderedDict(first=first, relu=nn.ReLU(), last=last))
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        logits = model(image)
        last.weight.mul_(4 / logits.std())
        assert last.bias is not None
        last.bias.sub_(logits.mean()).mul_(4 / logits.std())
    return model.eval(), image


# --- where it may go: each gets a module and an example, and returns what answers in its place ---


def export(module: nn.Module, x: Tensor, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program: Any = torch.onnx.export(module, (x,), dynamo=True, verbose=False)
        program.save(path)
    return path


def by_onnxruntime(path: Path) -> Answer:
    session = _module("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x.numpy()})[0]


def onnxruntime(module: nn.Module, x: Tensor, folder: Path) -> Answer:
    return by_onnxruntime(export(module, x, folder / "model.onnx"))


def as_float16(module: nn.Module, x: Tensor, folder: Path) -> Path:
    """onnxconverter-common, input and output kept in float32."""
    onnx, path = _module("onnx"), export(module, x, folder / "model.onnx")
    convert = _module("onnxconverter_common").float16.convert_float_to_float16
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        onnx.save(convert(onnx.load(path), keep_io_types=True), folder / "made.onnx")
    return folder / "made.onnx"


def as_int8(module: nn.Module, x: Tensor, folder: Path, operators: list[str] | None = None) -> Path:
    """onnxruntime's static quantisation, calibrated with the image itself."""
    tools, path = _module("onnxruntime.quantization"), export(module, x, folder / "model.onnx")
    feeds = iter([{by_name(path): x.numpy()}])

    class Reader(tools.CalibrationDataReader):  # type: ignore[name-defined,misc]
        def get_next(self) -> dict[str, Any] | None:
            return next(feeds, None)

    made = folder / "made.onnx"
    tools.quantize_static(path, made, Reader(), op_types_to_quantize=operators)
    return made


def half(module: nn.Module, x: Tensor, folder: Path) -> Answer:
    return by_onnxruntime(as_float16(module, x, folder))


def int8(module: nn.Module, x: Tensor, folder: Path) -> Answer:
    return by_onnxruntime(as_int8(module, x, folder))


def int8_conv(module: nn.Module, x: Tensor, folder: Path) -> Answer:
    return by_onnxruntime(as_int8(module, x, folder, ["Conv"]))


def then_repaired(convert: Callable[[nn.Module, Tensor, Path], Path]) -> Build:
    """The network alone is converted, and the repair appended to the result."""

    def build(module: nn.Module, x: Tensor, folder: Path) -> Answer:
        network, repair = module.get_submodule("network"), module.get_submodule("repair")
        path = convert(network, x, folder)
        if isinstance(repair, Repair):
            onnx, tools = _module("onnx"), _module("sc_bce.integrations.onnx")
            onnx.save(tools.append(path, repair), path)
        return by_onnxruntime(path)

    return build


def by_name(path: Path) -> str:
    return str(_module("onnx").load(path).graph.input[0].name)


def openvino(module: nn.Module, x: Tensor, folder: Path, half: bool | None = None) -> Answer:
    ov, path = _module("openvino"), export(module, x, folder / "model.onnx")
    core = ov.Core()
    model = core.read_model(path)
    if half is not None:
        ov.save_model(model, folder / "model.xml", compress_to_fp16=half)
        model = core.read_model(folder / "model.xml")
    # Else it computes in bfloat16 where the processor has it.
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda x: compiled(x.numpy())[0]


def openvino_saved(module: nn.Module, x: Tensor, folder: Path) -> Answer:
    return openvino(module, x, folder, True)


def openvino_whole(module: nn.Module, x: Tensor, folder: Path) -> Answer:
    return openvino(module, x, folder, False)


def opencv(module: nn.Module, x: Tensor, folder: Path) -> Answer:
    net = _module("cv2").dnn.readNetFromONNX(str(export(module, x, folder / "model.onnx")))

    def answer(x: Tensor) -> Any:
        net.setInput(x.numpy())
        return net.forward()

    return answer


def tract(module: nn.Module, x: Tensor, folder: Path) -> Answer:
    package = _module("tract")
    model = package.onnx().load(export(module, x, folder / "model.onnx"))
    model.set_input_fact(0, ",".join(map(str, x.shape)) + ",f32")
    runnable = model.into_model().into_runnable()
    return lambda x: runnable.run([x.numpy()])[0].to_numpy()


def mnn(module: nn.Module, x: Tensor, folder: Path) -> Answer:
    package, path = _module("MNN"), folder / "model.mnn"
    source = str(export(module, x, folder / "model.onnx"))
    # Not by MNN.tools, which installs packages when it is imported.
    _module("_tools").mnnconvert(
        ["", "-f", "ONNX", "--modelFile", source, "--MNNModel", str(path), "--bizCode", "MNN"]
    )
    if not path.exists():
        raise RuntimeError("the converter writes no file")
    net = package.nn.load_module_from_file(str(path), [by_name(Path(source))], [])

    def answer(x: Tensor) -> Any:
        value = package.expr.const(x.numpy(), list(x.shape), package.expr.NCHW)
        return np.array(package.expr.convert(net.forward([value])[0], package.expr.NCHW).read())

    return answer


def ncnn(module: nn.Module, x: Tensor, folder: Path) -> Answer:
    """By pnnx, which reads what torch.jit.trace writes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _module("pnnx").export(module, str(folder / "model.pt"), (x,), fp16=False)
    net = _module("ncnn").Net()
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    for load, end in ((net.load_param, "param"), (net.load_model, "bin")):
        if load(str(folder / f"model.ncnn.{end}")):
            raise RuntimeError(f"the .{end} file does not load")

    def answer(x: Tensor) -> Any:
        extractor = net.create_extractor()
        extractor.input("in0", _module("ncnn").Mat(x.numpy()[0]).clone())
        code, out = extractor.extract("out0")
        if code:
            raise RuntimeError(f"the extractor returns {code}")
        return np.array(out)

    return answer


def executorch(module: nn.Module, x: Tensor, folder: Path, parts: Any = None) -> Answer:
    exir, path = _module("executorch.exir"), folder / "model.pte"
    program = torch.export.export(module, (x,))
    lowered = exir.to_edge_transform_and_lower(program, partitioner=parts or [])
    path.write_bytes(lowered.to_executorch().buffer)
    method = _module("executorch.runtime").Runtime.get().load_program(path).load_method("forward")
    return lambda x: method.execute([x.contiguous()])[0].numpy().copy()


def xnnpack(module: nn.Module, x: Tensor, folder: Path) -> Answer:
    name = "executorch.backends.xnnpack.partition.xnnpack_partitioner"
    return executorch(module, x, folder, [_module(name).XnnpackPartitioner()])


def inductor(module: nn.Module, x: Tensor, folder: Path) -> Answer:
    program = torch.export.export(module, (x,))
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "model.pt2"))
    loaded: Answer = torch._inductor.aoti_load_package(path)
    return loaded


_WEB = """
const ort = require("onnxruntime-web"), fs = require("fs");
ort.env.wasm.numThreads = 1; ort.env.logLevel = "error";
const [model, shape, input, output] = process.argv.slice(1);
const read = path => new Uint8Array(fs.readFileSync(path));
(async () => {
  const session = await ort.InferenceSession.create(read(model), {executionProviders: ["wasm"]});
  const values = new Float32Array(read(input).buffer);
  const x = new ort.Tensor("float32", values, JSON.parse(shape));
  const answer = (await session.run({[session.inputNames[0]]: x}))[session.outputNames[0]];
  fs.writeFileSync(output, Uint8Array.from(Buffer.from(Float32Array.from(answer.data).buffer)));
  process.exit(0);
})().catch(error => { console.error(String(error)); process.exit(1); });
"""


def web(module: nn.Module, x: Tensor, folder: Path) -> Answer:
    onnx, path = _module("onnx"), export(module, x, folder / "model.onnx")
    onnx.save(onnx.load(path), folder / "one.onnx")  # weights inside

    def answer(x: Tensor) -> Any:
        source, result = folder / "in.bin", folder / "out.bin"
        source.write_bytes(x.numpy().tobytes())
        parts = map(str, (folder / "one.onnx", list(x.shape), source, result))
        run = subprocess.run(["node", "-e", _WEB, *parts], capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(run.stderr.strip().splitlines()[-1])
        return np.frombuffer(result.read_bytes(), np.float32)

    return answer


def coreml(module: nn.Module, x: Tensor, folder: Path) -> None:
    """Conversion only: what it makes runs on Apple's systems."""
    package = _module("coremltools")
    program = torch.export.export(module, (x,)).run_decompositions({})
    # By default it computes in float16, the index of a table too.
    package.convert(program, compute_precision=package.precision.FLOAT32)


class Destination(NamedTuple):
    needs: str  # module
    package: str  # whose version is printed
    build: Build
    special: bool = True  # whether it makes sense for the repair alone


DESTINATIONS = {
    "onnxruntime": Destination("onnxruntime", "onnxruntime", onnxruntime),
    "onnxruntime, float16": Destination("onnxconverter_common", "onnxconverter-common", half),
    "onnxruntime, int8": Destination("onnxruntime", "onnxruntime", int8, False),
    "onnxruntime, int8 Conv": Destination("onnxruntime", "onnxruntime", int8_conv, False),
    "onnxruntime, float16, then `append`": Destination(
        "onnxconverter_common", "onnxconverter-common", then_repaired(as_float16), False
    ),
    "onnxruntime, int8, then `append`": Destination(
        "onnxruntime", "onnxruntime", then_repaired(as_int8), False
    ),
    "onnxruntime-web": Destination("onnx", "", web),
    "OpenVINO": Destination("openvino", "openvino", openvino),
    "OpenVINO, saved": Destination("openvino", "openvino", openvino_saved),
    "OpenVINO, saved, compress_to_fp16=False": Destination("openvino", "openvino", openvino_whole),
    "OpenCV": Destination("cv2", "opencv-python-headless", opencv),
    "tract": Destination("tract", "tract", tract),
    "MNN": Destination("MNN", "MNN", mnn),
    "ncnn": Destination("ncnn", "ncnn", ncnn),
    "ExecuTorch, portable": Destination("executorch", "executorch", executorch),
    "ExecuTorch, XNNPACK": Destination("executorch", "executorch", xnnpack),
    "AOTInductor": Destination("torch", "torch", inductor),
    "Core ML": Destination("coremltools", "coremltools", coreml),
}


def _module(name: str) -> Any:
    return importlib.import_module(name)


# --- what is compared ---


def compared(answer: Answer, module: Answer, x: Tensor) -> tuple[float, list[float]]:
    """The largest difference from torch, and what nan became."""
    with torch.no_grad():
        want = module(x).numpy()
    got, nan = np.asarray(answer(x)).reshape(want.shape), np.isnan(want)
    with np.errstate(invalid="ignore"):
        differ = np.where(got == want, 0, np.abs(got.astype(np.float64) - want))
    return float(differ[~nan].max()), got[nan].tolist()


def of_probabilities(answer: Answer, module: nn.Module, x: Tensor) -> tuple[float, list[float]]:
    """The same of what a sigmoid makes of the logits; the logits that nan became."""

    def sure(z: Any) -> Tensor:
        return torch.sigmoid(torch.as_tensor(np.array(z)).double())

    difference, _ = compared(lambda x: sure(answer(x)), lambda x: sure(module(x)), x)
    return difference, compared(answer, module, x)[1]


def seen(name: str, repair: str | None, out: Any) -> None:
    """Into a queue: what is compared for an image, and for the special values of the repair."""
    logging.disable(logging.ERROR)
    destination, (model, image) = DESTINATIONS[name], network()
    one, x = fitted(BUILDS[repair]) if repair else (nn.Identity(), image)
    pairs: list[tuple[nn.Module, Tensor]] = [
        (nn.Sequential(OrderedDict(network=model, repair=one)).eval(), image)
    ]
    if repair and destination.special:
        pairs.append((one, x))
    found: list[Any] = []
    with tempfile.TemporaryDirectory() as folder:
        for module, given in pairs:
            try:
                place = Path(tempfile.mkdtemp(dir=folder))
                answer = destination.build(module, given, place)
                found.append(of_probabilities(answer, module, given) if answer else "converts")
            except Exception as error:
                print(f"{name}, {repair}: {type(error).__name__}: {error}", file=sys.stderr)
                found.append("refused")
    out.put(found)


def row(name: str) -> str:
    """Each repair in a process of its own, which may end by a signal."""
    spawn, cells = multiprocessing.get_context("spawn"), []
    special, became = 0.0, set()
    for repair in (None, *BUILDS):
        out = spawn.Queue()
        worker = spawn.Process(target=seen, args=(name, repair, out))
        worker.start()
        found: list[Any] = []
        while not found:
            try:
                found = out.get(timeout=1)
            except queue.Empty:
                if not worker.is_alive():
                    found = [f"ends by {worker.exitcode}"]
        worker.join(5)
        cells.append(found[0] if isinstance(found[0], str) else f"{found[0][0]:.1g}")
        if len(found) > 1 and not isinstance(found[1], str):
            special = max(special, found[1][0])
            became |= {f"{one:.3g}" for one in found[1][1]}
    last = (f"{special:.1g}", ", ".join(sorted(became))) if became else ("", "")
    package = DESTINATIONS[name].package
    version = f" {importlib.metadata.version(package).split('+')[0]}" if package else ""
    return f"| {name}{version} | {' | '.join((*cells, *last))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(DESTINATIONS))
    names = parser.parse_args().names
    titles = "to", "network alone", *(f"`{one}`" for one in BUILDS), "special values", "nan becomes"
    print(f"| {' | '.join(titles)} |\n{'|---' * len(titles)}|")
    for name, one in DESTINATIONS.items():
        if name in names or (not names and importlib.util.find_spec(one.needs)):
            print(row(name), flush=True)


if __name__ == "__main__":
    main()
