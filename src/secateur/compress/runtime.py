"""ONNX Runtime on the CPU, as a network that answers but has no gradient, and how far it agrees with its twin."""

from __future__ import annotations

import platform
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ModelError, check_range
from ..measure.accuracy import predict
from ..measure.intervals import wilson
from ..models.files import one_line
from ..types import ImageSet, Rate
from .export import need

CPUINFO = Path("/proc/cpuinfo")
EXACT = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})  # instructions that add uint8 x int8 products in 32 bits
AGREE = 0.99  # share of equal answers below which a twin does not stand for its runtime


class Runtime(nn.Module):
    """A file, run by ONNX Runtime; takes and returns what a `Classifier` does, on the CPU, without a gradient.

    It can be given wherever a network is measured (`predict`, `evaluate`, `robustness` with ``square``); gradient attacks take
    ``forward=bpda(twin)``, whose answers are then those of the runtime. Threads and order are fixed, so that the same images in
    the same batch get the same logits.

    Attributes:
        path: The file.
        threads: How many compute one operation.
        batch: Images at once, where the file is for so many only; None for any number.
    """

    def __init__(self, path: str | Path, *, threads: int = 1) -> None:
        """Load a file.

        Args:
            path: An ONNX file of `export_onnx`, or another with one input ``(batch, c, h, w)`` and one output.
            threads: How many compute one operation, >= 1.

        Raises:
            ModelError: The extra ``onnx`` is missing, or the file cannot be loaded.
        """
        super().__init__()
        check_range("threads", threads, 1, 1024)
        self.path, self.threads = Path(path), threads
        self.session = _session(self.path, threads)
        inputs, outputs = self.session.get_inputs(), self.session.get_outputs()
        if len(inputs) != 1 or len(outputs) != 1:
            raise ModelError(f"{path} must have one input and one output, got {len(inputs)} and {len(outputs)}")
        self.names = inputs[0].name, outputs[0].name
        self.batch = inputs[0].shape[0] if isinstance(inputs[0].shape[0], int) else None
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(batch, classes)`` for images ``(batch, c, h, w)``, float in [0, 1]."""
        name, answer = self.names
        images = np.ascontiguousarray(x.detach().cpu().numpy(), dtype=np.float32)
        try:
            parts = [self.session.run([answer], {name: part})[0] for part in self._parts(images)]
        except Exception as error:  # onnxruntime's exceptions have no common base that it promises
            raise ModelError(f"the runtime cannot take images of shape {tuple(x.shape)}: {one_line(error)}") from error
        return torch.from_numpy(np.concatenate(parts)[: len(images)]).to(x.device)

    def _parts(self, images: Any) -> list[Any]:
        if self.batch is None:
            return [images]
        short = -len(images) % self.batch
        full = np.concatenate([images, np.zeros((short, *images.shape[1:]), np.float32)])
        return np.split(full, len(full) // self.batch)


@dataclass(frozen=True)
class Agreement:
    """How far two networks answer alike; to be printed before any claim about the second that was measured on the first.

    Attributes:
        same: Share of images with the same answer.
        twin: Accuracy of the twin.
        runtime: Accuracy of the runtime.
    """

    same: Rate
    twin: Rate
    runtime: Rate

    @property
    def holds(self) -> bool:
        """Whether the twin stands for the runtime: at least 99 % of the answers are the same."""
        return self.same.value >= AGREE

    def __str__(self) -> str:
        return f"same answer {self.same}; accuracy of the twin {self.twin}, of the runtime {self.runtime}"


def agreement(twin: nn.Module, runtime: nn.Module, data: ImageSet, *, batch_size: int = 128) -> Agreement:
    """Compare the answers of a quantised network with those of its runtime on labelled images.

    Args:
        twin: The quantised network; left as it was.
        runtime: What stands for it; mostly a `Runtime`.
        data: Test images.
        batch_size: Images at once.

    Raises:
        InconclusiveError: There are no images.
        ModelError: A network does not accept the images.
    """
    answers = [predict(network, data, batch_size=batch_size) for network in (twin, runtime)]
    same = int((answers[0] == answers[1]).sum())
    return Agreement(wilson(same, len(data)), *(wilson(int((found == data.y).sum()), len(data)) for found in answers))


def kernels(path: str | Path) -> Mapping[str, int]:
    """Return which operations ONNX Runtime computes for a file, once it has optimised it, and how often.

    ``QLinearConv`` computes in whole numbers, ``Conv`` does not.
    """
    onnx = need("onnx")
    with tempfile.TemporaryDirectory() as folder:
        optimised = Path(folder) / "optimised.onnx"
        _session(Path(path), 1, optimised)
        return dict(Counter(node.op_type for node in onnx.load(optimised).graph.node).most_common())


def saturates() -> bool | None:
    """Return whether this CPU may get products of uint8 and int8 wrong; None where that is not known.

    Without VNNI, x86 adds two such products in 16 bits, where they may not fit (2 * 255 * 127 > 32767), and goes on with the
    largest number that does. Weights of 7 bits cannot (``quantise(weight_bits=7)``; ONNX Runtime calls it ``reduce_range``).
    Other processors add in 32 bits.
    """
    if platform.machine().lower() not in ("x86_64", "amd64", "i386", "i686"):
        return False if platform.machine() else None
    try:
        lines = CPUINFO.read_text("utf-8").splitlines()
    except OSError:
        return None
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), None)
    return None if flags is None else EXACT.isdisjoint(flags)


def safe_weight_bits() -> tuple[int, str]:
    """Return with how many bits weights are exact in an integer runtime on this CPU, and why."""
    found = saturates()
    if found is False:
        return 8, "8-bit weights: this CPU adds products of uint8 and int8 in 32 bits"
    why = "has no VNNI, so that sums of products may saturate" if found else "does not tell whether it has VNNI"
    return 7, f"7-bit weights: this CPU {why}"


def _session(path: Path, threads: int, optimised: Path | None = None) -> Any:
    runtime = need("onnxruntime")
    if not path.is_file():
        raise ModelError(f"{path} must be a file, found {'a folder' if path.is_dir() else 'none'}")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.execution_mode = runtime.ExecutionMode.ORT_SEQUENTIAL
    options.use_deterministic_compute = True
    options.log_severity_level = 3
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
    try:
        return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ModelError(f"ONNX Runtime cannot load {path}: {one_line(error)}") from error
