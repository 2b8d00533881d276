"""What a model costs: parameters, bytes, multiplications, milliseconds, memory."""

from __future__ import annotations

import contextlib
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tutelage.deploy.calling import Example, as_call, batch_size_of, device_of, feeds, resized, undisturbed
from tutelage.errors import require
from tutelage.views import move


@dataclass(frozen=True)
class Measurement:
    """What a model costs; a field is None where it cannot be known.

    Attributes:
        parameters: Number of weights, shared ones once.
        buffers: Number of values in the buffers (running statistics and the like), apart from the parameters.
        size_bytes: Bytes of the file that holds the model: safetensors for a module, the ONNX file otherwise.
        macs: Multiply-accumulate operations for one sample, of matrix products and convolutions.
        latency_p50_ms: Median time of one call.
        latency_p95_ms: 95th percentile of the time of one call.
        peak_memory_bytes: Weights, buffers and inputs with the most that a call holds beyond them.
        device: Where it ran: ``"cpu"``, ``"cuda:0"``.
        threads: Threads of the processor that one operation may use.
        precision: The type of most of the weights: ``"float32"``, ``"int8"``.
        batch_size: Samples in one timed call.
    """

    parameters: int | None
    buffers: int | None
    size_bytes: int
    macs: int | None
    latency_p50_ms: float
    latency_p95_ms: float
    peak_memory_bytes: int | None
    device: str
    threads: int
    precision: str
    batch_size: int = 1


def measure(
    model: nn.Module, example: Example, *, runs: int = 100, warmup: int = 10, batch_size: int | None = None
) -> Measurement:
    """Measure a model in eval mode on its own device; it is left with the modes and buffers it came with.

    Multiply-accumulate operations are half of what ``torch.utils.flop_counter`` counts for one sample. Fused
    kernels that it does not know (LSTMs, transformer layers and attention on the processor) are replaced by
    their plain forms while counting; the timing is of the model as it is.

    Memory is what CUDA's allocator reports; on the processor it is the largest sum of live tensors between two
    operations, which leaves out what a kernel allocates inside itself.

    Args:
        model: The module.
        example: A tensor, a tuple of positional arguments, or a dict of keyword arguments; rows are the first
            dimension. It is moved to the model's device.
        runs: Timed calls.
        warmup: Calls before them.
        batch_size: Samples in a timed call, one by default. The example is cut, or its rows repeated.

    Returns:
        The measurement.

    Raises:
        ValueError: ``runs``, ``warmup`` or ``batch_size`` is out of range, or the example has no rows.

    >>> m = measure(nn.Linear(10, 5), torch.zeros(1, 10), runs=2, warmup=1)
    >>> m.parameters, m.buffers, m.macs, m.precision
    (55, 0, 50, 'float32')
    """
    _check_runs(runs, warmup)
    device = device_of(model)
    example = move(example, device)
    batch = resized(example, 1 if batch_size is None else batch_size)
    args, kwargs = as_call(batch)
    with undisturbed(model), torch.inference_mode():
        latencies = _latencies(lambda: model(*args, **kwargs), runs, warmup, device)
        peak = _peak_memory(model, args, kwargs, device)
    return Measurement(
        parameters=sum(p.numel() for p in model.parameters()),
        buffers=sum(b.numel() for b in model.buffers()),
        size_bytes=_size_bytes(model),
        macs=_macs(model, resized(example, 1)),
        latency_p50_ms=float(np.percentile(latencies, 50)),
        latency_p95_ms=float(np.percentile(latencies, 95)),
        peak_memory_bytes=peak,
        device=str(device),
        threads=torch.get_num_threads(),
        precision=_precision(model, args, kwargs),
        batch_size=batch_size_of(batch),
    )


def measure_onnx(
    path: str | Path,
    example: Example,
    *,
    runs: int = 100,
    warmup: int = 10,
    batch_size: int | None = None,
    threads: int | None = None,
) -> Measurement:
    """Measure an ONNX file in onnxruntime on the processor.

    Args:
        path: The file.
        example: The inputs: a tensor or tuple in the order of the file's inputs, or a dict by their names.
        runs: Timed calls.
        warmup: Calls before them.
        batch_size: Samples in a timed call; one by default, or what the file fixes.
        threads: Threads of an operation; PyTorch's number by default, so that both are timed on equal terms.

    Returns:
        The measurement; parameters, buffers, operations and memory are None.

    Raises:
        ImportError: onnx or onnxruntime is not installed.
        ValueError: ``runs``, ``warmup`` or ``batch_size`` is out of range.
    """
    onnx = require("onnx", extra="export")
    ort = require("onnxruntime", extra="export")
    _check_runs(runs, warmup)
    threads = torch.get_num_threads() if threads is None else threads
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    if batch_size is None:
        fixed = session.get_inputs()[0].shape[0] if session.get_inputs()[0].shape else None
        batch_size = fixed if isinstance(fixed, int) else 1
    batch = resized(example, batch_size)
    inputs = feeds([i.name for i in session.get_inputs()], batch)
    latencies = _latencies(lambda: session.run(None, inputs), runs, warmup, torch.device("cpu"))

    graph = onnx.load(str(path), load_external_data=False).graph
    beside = {entry.value for tensor in graph.initializer for entry in tensor.external_data if entry.key == "location"}
    return Measurement(
        parameters=None,
        buffers=None,
        size_bytes=sum(f.stat().st_size for f in (Path(path), *(Path(path).parent / name for name in beside))),
        macs=None,
        latency_p50_ms=float(np.percentile(latencies, 50)),
        latency_p95_ms=float(np.percentile(latencies, 95)),
        peak_memory_bytes=None,
        device="cpu",
        threads=threads,
        precision=_onnx_precision(onnx, graph),
        batch_size=batch_size,
    )


def _check_runs(runs: int, warmup: int) -> None:
    if runs < 1:
        raise ValueError(f"runs is {runs}: expected at least 1")
    if warmup < 0:
        raise ValueError(f"warmup is {warmup}: expected 0 or more")


def _latencies(call: Callable[[], Any], runs: int, warmup: int, device: torch.device) -> list[float]:
    """Milliseconds of each call."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for _ in range(warmup):
        call()
    times = []
    for _ in range(runs):
        wait()
        start = time.perf_counter()
        call()
        wait()
        times.append(1e3 * (time.perf_counter() - start))
    return times


@contextlib.contextmanager
def _plain_kernels() -> Iterator[None]:
    """Operations that can be counted: no compiled graphs, no fused transformer layers, attention or LSTMs."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    # Setting PyTorch's oneDNN flags touches a deprecated TF32 switch, hence only the one flag.
    onednn = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        with torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        torch._C._set_mkldnn_enabled(onednn)


def _macs(model: nn.Module, sample: Example) -> int:
    args, kwargs = as_call(sample)
    counter = FlopCounterMode(display=False)
    with undisturbed(model), _plain_kernels(), counter:
        model(*args, **kwargs)
    return counter.get_total_flops() // 2


def _size_bytes(model: nn.Module) -> int:
    """Bytes of the saved state: safetensors, or torch.save for states that it cannot hold (packed weights)."""
    from safetensors.torch import save_model

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model"
        try:
            save_model(model, str(file))
        except (AttributeError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError):
            torch.save(model.state_dict(), file)
        return file.stat().st_size


class _LiveTensors(TorchDispatchMode):
    """Adds up the storages that operations make, until they are freed."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.bytes: dict[int, int] = {}
        for tensor in known:
            self.add(tensor)

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.bytes:
            self.bytes[key] = storage.nbytes()
            self.live += self.bytes[key]
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.drop, key)

    def drop(self, key: int) -> None:
        self.live -= self.bytes.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return out


def _peak_memory(model: nn.Module, args: Any, kwargs: Any, device: torch.device) -> int | None:
    held = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    held += [*model.parameters(), *model.buffers()]
    if device.type == "cuda":
        # Other models may live on the device too: only the growth is this one's.
        storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in held}
        own = sum(storage.nbytes() for storage in storages.values())
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        model(*args, **kwargs)
        torch.cuda.synchronize(device)
        return own + torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        return None
    try:
        with torch.compiler.set_stance("force_eager"), _LiveTensors(held) as live:
            model(*args, **kwargs)
    except (NotImplementedError, RuntimeError):
        # Tensors without a storage (packed or opaque weights) cannot be added up.
        return None
    return live.peak


def _precision(model: nn.Module, args: Any, kwargs: Any) -> str:
    counts: dict[str, int] = {}
    tensors: list[Any] = [*model.parameters()]
    for leaf in tensors or [*model.buffers(), *pytree.tree_leaves((args, kwargs))]:
        if isinstance(leaf, Tensor):
            name = str(leaf.dtype).removeprefix("torch.")
            counts[name] = counts.get(name, 0) + leaf.numel()
    return _most(counts)


def _most(counts: dict[str, int]) -> str:
    return max(counts, key=counts.__getitem__, default="float32")


def _onnx_precision(onnx: Any, graph: Any) -> str:
    counts: dict[str, int] = {}
    for tensor in graph.initializer:
        # Shapes and axes are int64 constants, not weights.
        if tensor.data_type != onnx.TensorProto.INT64:
            name = onnx.TensorProto.DataType.Name(tensor.data_type).lower()
            name = {"float": "float32", "double": "float64"}.get(name, name)
            counts[name] = counts.get(name, 0) + int(np.prod(tensor.dims, dtype=np.int64))
    return _most(counts)
