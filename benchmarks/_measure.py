"""What a training step costs: time, operations, memory, and where the time goes."""

import os
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.autograd.graph import saved_tensors_hooks
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

SIDE = {"cpu": 2048, "cuda": 8192}  # of the matrices whose product gives the best rate of the machine
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would tell that it starts and stops
STEP = "a step"  # what is left of it when all operators are taken out: Python
MATRIX_PRODUCTS = {f"aten::{name}" for name in ("mm", "addmm", "bmm", "baddbmm", "_addmm_activation")}
ATTENTION = ("_flash_attention_for_cpu", "_flash_attention", "_efficient_attention", "_cudnn_attention")
Run = Callable[[], Any]


def seconds(run: Run, device: torch.device) -> float:
    """Of this process on a CPU, so that other jobs do not count; between two events on a GPU."""
    if device.type == "cuda":
        return _seconds_cuda(run)
    start = time.process_time()
    run()
    return time.process_time() - start


def matmul_rate(device: torch.device) -> float:
    """Operations a second of one product of two large matrices, in the precision of training."""
    n, dtype = SIDE[device.type], torch.bfloat16 if device.type == "cuda" else torch.float32
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / seconds(lambda: a @ a, device)


def flops(run: Run) -> int:
    """Operations of the model's products, forward and backward; nothing counts that is only computed again."""
    with FlopCounterMode(display=False, custom_mapping=_attention_flops()) as counter:
        run()
    return counter.get_total_flops()


def saved_bytes(run: Callable[[], Tensor], module: nn.Module, given: Iterable[Tensor] = ()) -> int:
    """What a forward keeps for its backward, each storage once; parameters and what it was `given` left out."""
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers(), *given)}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: Tensor) -> None:
        """Keeps the storage, so that no other takes its place; a tensor would keep its own graph for ever."""
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage

    with saved_tensors_hooks(note, lambda _: None):
        loss = run()
    del loss
    return sum(storage.nbytes() for where, storage in kept.items() if where not in own)


def resident_bytes(module: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Weights and the optimiser's state."""
    state = [v for values in optimizer.state.values() for v in values.values() if isinstance(v, Tensor)]
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers(), *state))


def peak_rise_bytes(run: Run, device: torch.device) -> int:
    """Most that is allocated at once during a step, above what was there before."""
    if device.type == "cuda":
        return _peak_rise_cuda(run)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def time_shares(run: Run, device: torch.device, num_steps: int) -> dict[str, float]:
    """Share of the time of some steps by operator, its callees left out; `STEP` is what no operator took."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiler, record_function(STEP):
        for _ in range(num_steps):
            run()
    clock = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    called = [e for e in profiler.key_averages() if e.device_type == DeviceType.CPU]  # kernels are listed once more
    spent = {event.key: getattr(event, clock) for event in called}
    return {name: value / sum(spent.values()) for name, value in spent.items()}


def grouped(shares: dict[str, float]) -> dict[str, float]:
    """Products, attention, optimiser, and everything else."""
    groups = dict.fromkeys(("matrix products", "attention", "optimiser", "everything else"), 0.0)
    for name, share in shares.items():
        groups[group_of(name)] += share
    return groups


def group_of(operator: str) -> str:
    """Which part of a step an operator belongs to."""
    if operator in MATRIX_PRODUCTS:
        return "matrix products"
    if any(operator.removesuffix("_backward").removesuffix("_forward").endswith(name) for name in ATTENTION):
        return "attention"
    return "optimiser" if "_adamw_" in operator else "everything else"


def _attention_flops() -> dict[Any, Callable[..., int]]:
    """Fused attention: torch does not count that of a CPU, and counts again what a backward recomputes."""
    forward, mapping = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, {}
    mapping[forward] = lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)
    for name in ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention"):
        backward = getattr(torch.ops.aten, f"_scaled_dot_product_{name}_backward")
        mapping[backward] = lambda _, q, k, v, *__, **___: 2 * sdpa_flop_count(q, k, v)
    return mapping


def _seconds_cuda(run: Run) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def _peak_rise_cuda(run: Run) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
