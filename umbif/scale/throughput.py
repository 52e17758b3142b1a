"""How fast training goes, what it waits for, and how much of the machine it uses.

Model FLOPs are counted, not estimated: the forward of the first batch, times three where gradients flow, since the
backward costs two forwards (Chowdhery et al. 2022, PaLM, arXiv:2204.02311, appendix B). Recomputation for activation
checkpointing is not counted, nor is anything but matrix products, convolutions and attention.
"""

import logging
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from resource import RUSAGE_SELF, getrusage
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.profilers import PassThroughProfiler
from torch.utils.flop_counter import FlopCounterMode, flop_registry

FORWARD_AND_BACKWARD = 3
MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024
MATMUL_SIDES, MATMUL_TRIES = (256, 1024), 10
SLOW_FLOPS = 1e10  # half precision on many CPUs: a large product would take seconds
DTYPES = {"64": torch.float64, "32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}
# Dense, by NVIDIA's data sheets: Lightning's table holds what these reach with sparsity, or two cards together.
PEAKS_TFLOPS = {
    "H200 NVL": {torch.bfloat16: 835.5, torch.float16: 835.5},
    "H200": {torch.bfloat16: 989.5, torch.float16: 989.5},
    "H100 NVL": {torch.bfloat16: 835.5, torch.float16: 835.5},
}
log = logging.getLogger("umbif")


class Throughput(Callback):
    """Logs exams per second, the share of time that training waited for data, and how much of the device it used.

    Rates leave out validation and the first step, in which FLOPs are counted and much is done for the first time.
    `throughput/mfu` is absent where the device's peak is not known.
    """

    def __init__(self) -> None:
        self.counter = StepCounter()
        self.fetching = FetchClock()
        self.peak_flops: float | None = None
        self.num_batches, self.last_step = 0, 0
        self.since_s = self.paused_s = 0.0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Measures or looks up the peak, while no worker reads yet."""
        self.peak_flops = peak_flops(trainer.strategy.root_device, str(trainer.precision))
        if type(trainer.profiler) is PassThroughProfiler:  # one that a user asked for stays
            trainer.profiler = self.fetching

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Will count the next batch."""
        self.counter, self.last_step = StepCounter(), trainer.global_step
        self._restart()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Counts FLOPs from here, once."""
        self.counter.start()

    def on_before_backward(self, *_: Any) -> None:
        """The forward is over."""
        self.counter.stop()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Logs at the Trainer's interval."""
        if self.counter.is_first:
            self.counter.end(self.peak_flops)
            self.last_step = trainer.global_step
            self._restart()
            return
        self.num_batches += 1
        stepped, self.last_step = trainer.global_step != self.last_step, trainer.global_step
        if stepped and trainer.global_step % trainer.log_every_n_steps == 0:
            pl_module.log_dict(self._values(trainer))
            self._restart()

    def on_validation_start(self, *_: Any) -> None:
        """Stops the clock."""
        self.paused_s = time.monotonic()

    def on_validation_end(self, *_: Any) -> None:
        """Lets the clock go on."""
        self.since_s += time.monotonic() - self.paused_s

    def on_exception(self, *_: Any) -> None:
        """Leaves no counter behind."""
        self.counter.stop()

    def _restart(self) -> None:
        self.num_batches, self.fetching.waited_s = 0, 0.0
        self.since_s = time.monotonic()

    def _values(self, trainer: pl.Trainer) -> dict[str, float]:
        """Of all micro-batches since the last time. FLOPs and peak are those of one process and its device."""
        span_s = max(time.monotonic() - self.since_s, 1e-9)
        flops_per_s = self.counter.flops * self.num_batches / span_s
        values = {
            "throughput/exams_per_s": self.num_batches * trainer.datamodule.global_batch_size / span_s,
            "throughput/tflops": flops_per_s / 1e12,
        }
        if trainer.profiler is self.fetching:
            values["throughput/data_wait"] = self.fetching.waited_s / span_s
        if self.peak_flops is not None:
            values["throughput/mfu"] = flops_per_s / self.peak_flops
        values["throughput/host_memory_gib"] = getrusage(RUSAGE_SELF).ru_maxrss * MAXRSS_BYTES / 2**30
        if torch.cuda.is_available():
            values["throughput/memory_gib"] = torch.cuda.max_memory_allocated(trainer.strategy.root_device) / 2**30
        return values


class StepCounter:
    """Counts the model FLOPs of one micro-batch on this process: three times its forward, once what needs no gradient.

    Weights that are frozen without `no_grad` are counted three times; nothing tells them apart simply.
    """

    def __init__(self) -> None:
        self.flops = 0.0
        self.is_first = True
        self._counting: ExitStack | None = None
        self._mode: FlopCounterMode | None = None

    def start(self) -> None:
        """Begins, the first time only."""
        if not self.is_first or self._counting is not None:
            return
        self._mode = FlopCounterMode(display=False, custom_mapping=formulas())
        self._counting = ExitStack()
        if "torch._dynamo" in sys.modules:  # compiled code has no operators left to count
            self._counting.enter_context(torch.compiler.set_stance("force_eager"))
        self._counting.enter_context(self._mode)

    def stop(self) -> None:
        """Ends; harmless where nothing is being counted."""
        if self._counting is not None and self._mode is not None:
            self._counting.close()
            self.flops = float(self._mode.get_total_flops())
            self._counting = self._mode = None

    def end(self, peak_flops: float | None) -> None:
        """The first batch is over: says what was found."""
        self.stop()
        self.is_first = False
        peak = "unknown" if peak_flops is None else f"{peak_flops / 1e12:.3g} TFLOP/s"
        log.info("a micro-batch takes %.4g GFLOP on each process; peak of its device: %s", self.flops / 1e9, peak)


class FetchClock(PassThroughProfiler):
    """Sums the time that the Trainer spends in fetching the next batch; monitors and checkpoints are none of it."""

    def __init__(self) -> None:
        super().__init__()
        self.waited_s = self._since_s = 0.0

    def start(self, action_name: str) -> None:
        """Called by the Trainer before whatever it does."""
        if action_name.endswith("train_dataloader_next"):
            self._since_s = time.monotonic()

    def stop(self, action_name: str) -> None:
        """Called by the Trainer after it."""
        if action_name.endswith("train_dataloader_next"):
            self.waited_s += time.monotonic() - self._since_s


def formulas() -> dict[Any, Callable[..., float]]:
    """FLOPs of each operator for a training step. torch's own table lacks attention on a CPU."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    known = {**flop_registry, flash: attention_flops}
    return {operator: _with_backward(formula) for operator, formula in known.items()}


def attention_flops(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> int:
    """Of (B, heads, N, width) queries: scores, and their products with the values."""
    rows = query.shape[0] * query.shape[1] * query.shape[2]
    return int(2 * rows * key.shape[2] * (query.shape[3] + value.shape[3]))


def _with_backward(formula: Callable[..., Any]) -> Callable[..., float]:
    def counted(*args: Any, **kwargs: Any) -> float:
        return float(formula(*args, **kwargs)) * (FORWARD_AND_BACKWARD if torch.is_grad_enabled() else 1)

    counted._get_raw = True  # type: ignore[attr-defined]  # torch passes tensors, not shapes, as to its own
    return counted


def peak_flops(device: torch.device, precision: str) -> float | None:
    """FLOP/s of dense matrix products that a device can reach at Lightning's `precision`; None where unknown."""
    dtype = DTYPES.get(precision.split("-")[0])
    if dtype is None:
        return None
    if device.type == "cpu":
        return measured_flops(dtype)
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for known, peaks in PEAKS_TFLOPS.items():
        if known in name and dtype in peaks:
            return peaks[dtype] * 1e12
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a device that it does not know: the absent column says as much
        return get_available_flops(device, dtype)


def measured_flops(dtype: torch.dtype) -> float:
    """Best rate of a few products of 1024 × 1024 matrices, with the threads in use; smaller ones if they are slow."""
    rate = 0.0
    for side in MATMUL_SIDES:
        a = torch.ones(side, side, dtype=dtype)
        rate = 2 * side**3 / min(_product_s(a) for _ in range(MATMUL_TRIES))
        if rate < SLOW_FLOPS:
            break
    return rate


def _product_s(a: torch.Tensor) -> float:
    begun = time.perf_counter()
    a @ a
    return time.perf_counter() - begun
