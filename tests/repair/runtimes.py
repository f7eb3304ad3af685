"""What runtimes make of an exported repair. As a script: the table of docs/guide/repair.md.

python tests/repair/runtimes.py  # needs onnx, onnxscript, and the runtimes to be compared
"""

import importlib
import itertools
import math
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch

from sc_bce import IsotonicCalibration, TemperatureScaling

RUNTIMES = {"onnxruntime": "onnxruntime", "OpenVINO": "openvino", "OpenCV": "cv2"}
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
BUILDS = {
    "TemperatureScaling()": TemperatureScaling,
    "TemperatureScaling((.05, .1), bias=True)": lambda: TemperatureScaling((0.05, 0.1), bias=True),
    "IsotonicCalibration()": IsotonicCalibration,
}


def fitted(build, from_logits=True, dtype=torch.float32):
    """A repair of a network that is twice too sure, and special inputs before ordinary ones."""
    generator = torch.Generator().manual_seed(0)
    truth = 2 * torch.randn(4000, generator=generator)
    target = torch.rand(4000, generator=generator) < torch.sigmoid(truth)
    input = 2 * truth if from_logits else torch.sigmoid(2 * truth)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a wrong flip rate is no matter here
        repair = build().fit(input, target, from_logits=from_logits).eval()
    x = torch.cat((torch.tensor(SPECIAL if from_logits else SPECIAL_P), input[:51]))
    return repair, x.to(dtype).reshape(4, 16)


def export(repair, x, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(repair, (x,), dynamo=True, verbose=False).save(path)
    return path


def answers(runtime, path, x):
    module = importlib.import_module(RUNTIMES[runtime])
    values = x.numpy()
    if runtime == "onnxruntime":
        session = module.InferenceSession(path, providers=["CPUExecutionProvider"])
        return session.run(None, {session.get_inputs()[0].name: values})[0]
    if runtime == "OpenVINO":
        # Else it computes in bfloat16 where the processor has it.
        setting = {"INFERENCE_PRECISION_HINT": "f32"}
        return module.Core().compile_model(str(path), "CPU", setting)(values)[0]
    net = module.dnn.readNetFromONNX(str(path))
    net.setInput(values)
    return net.forward()


def compared(runtime, repair, x, path):
    """The largest difference from torch, and what nan became."""
    got = np.asarray(answers(runtime, path, x)).reshape(x.shape)
    with torch.no_grad():
        want = repair(x).numpy()
    nan = np.isnan(x.numpy())
    with np.errstate(invalid="ignore"):
        differ = np.where(got == want, 0, np.abs(got.astype(np.float64) - want))
    return float(differ[~nan].max()), got[nan].tolist()


def main():
    print(
        "| repair | fitted to | runtime | largest difference | nan becomes |\n|---|---|---|---|---|"
    )
    for (name, build), logits in itertools.product(BUILDS.items(), (True, False)):
        repair, x = fitted(build, logits)
        with tempfile.TemporaryDirectory() as folder:
            path = export(repair, x, Path(folder) / "repair.onnx")
            for runtime, module in RUNTIMES.items():
                version = importlib.import_module(module).__version__.split("-")[0]
                difference, nan = compared(runtime, repair, x, path)
                kind = "logits" if logits else "probabilities"
                became = ", ".join(f"{one:g}" for one in nan)
                row = f"`{name}` | {kind} | {runtime} {version} | {difference:.1g} | {became}"
                print(f"| {row} |", flush=True)


if __name__ == "__main__":
    main()
