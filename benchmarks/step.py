"""What a training step costs, beside public masked autoencoders at the same encoder.

    python benchmarks/step.py                        ViT-S and ViT-B on one thread of a CPU, about half an hour
    python benchmarks/step.py --quick                seconds, at a size that says nothing
    python benchmarks/step.py --device cuda          ViT-B, -L and -H in bf16, compiled

All contestants live in one process and step in turn, A B C A B C …; a time is the median of its rounds, in seconds of
this process, and is compared within the run only. Rivals, their versions and licences: `_contestants.py`.
"""

import argparse
import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from _contestants import RECIPES, Contestant, Work, contestants, has_transformers
from _measure import (
    flops,
    grouped,
    matmul_rate,
    peak_rise_bytes,
    resident_bytes,
    saved_bytes,
    seconds,
    time_shares,
)
from _report import Row, print_table, write_json
from _verdict import print_verdict, print_where

from umbif.quiet import quiet
from umbif.scale.throughput import peak_flops

MIB = 2**20
NUM_PROFILED = 3  # steps


@dataclass(frozen=True)
class Cost:
    """Of one contestant with one optimiser."""

    work: Work
    key: str
    optimizer: str
    name: str
    forward_backward_s: float
    optimizer_s: float
    guard_s: float  # clipping and the look for spikes, which rivals leave to others: not in `step_s`
    flops: int
    saved_bytes: float  # of a view
    peak_bytes: int
    seen: float  # patches of a view
    asked: float
    shares: dict[str, float] | None  # of the step's time by operator

    @property
    def step_s(self) -> float:
        """Forward, backward and optimiser."""
        return self.forward_backward_s + self.optimizer_s


@dataclass
class Measured:
    """What is gathered of a contestant before and during the rounds."""

    contestant: Contestant
    flops: int
    saved_bytes: int
    peak_bytes: dict[str, int]
    seconds: list[dict[str, float]]


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints, and writes."""
    args = arguments(argv)
    quiet()
    device = torch.device(args.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    if not has_transformers():
        print("transformers is not installed: VideoMAE is left out. Install it with pip install 'umbif[bench]'")
    rates = [matmul_rate(device) for _ in range(4)][1:]
    for work in works(args, device):
        costs = measure(work, args.rounds, rates)
        best = promised_rate(device) or max(rates)
        rows = report(costs, best)
        print(f"MFU is held against {best / 1e9:.1f} GFLOP/s; a large product ran at {max(rates) / 1e9:.1f} at best.")
        if args.json:
            write_json(args.json, rows, device)
    print(NOTE)


def promised_rate(device: torch.device) -> float | None:
    """What a GPU's maker promises in bf16; None for a CPU, whose rate is measured, and for an unknown GPU."""
    return peak_flops(device, "bf16-mixed") if device.type == "cuda" else None


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="What a training step costs, beside public masked autoencoders.")
    parser.add_argument("--quick", action="store_true", help="tiny networks, one round")
    parser.add_argument("--sizes", nargs="+", choices=[*RECIPES], help="default: S B, on a GPU B L H")
    parser.add_argument("--sequences", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--batch", type=int, help="views of a step, an even number; default: 2, on a GPU 64")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU")
    if args.batch is not None and (args.batch < 2 or args.batch % 2):
        parser.error(f"--batch {args.batch}: an exam has two views, so an even number")
    if args.quick:
        args.sizes, args.rounds = ["tiny"], 1
    return args


def works(args: argparse.Namespace, device: torch.device) -> Iterator[Work]:
    """Every size with every number of sequences."""
    on_gpu = device.type == "cuda"
    for size in args.sizes or (["B", "L", "H"] if on_gpu else ["S", "B"]):
        crop = 48 if size == "tiny" else 128 if on_gpu else 96
        for num_sequences in args.sequences:
            yield Work(size, num_sequences, args.batch or (64 if on_gpu else 2), crop, device)


# ---------------------------------------------------------------- measuring


def measure(work: Work, rounds: int, rates: list[float]) -> list[Cost]:
    """All contestants, in turn. The networks of the work before are gone first: they hold themselves in circles."""
    gc.collect()
    print(f"{work.title} …", flush=True)
    entries = [entry for c in contestants(work) if (entry := prepared(c, work)) is not None]
    for number in range(rounds + 1):
        for entry in entries:
            spent = timed_step(entry.contestant, work.device)
            entry.seconds += [spent] if number else []  # the first is a warm-up
        rates.append(matmul_rate(work.device))
    return [cost for entry in entries for cost in summary(entry, work)]


def prepared(contestant: Contestant, work: Work) -> Measured | None:
    """What needs no clock, then compiled; None for one that does not fit into the memory."""
    try:
        for optimizer in contestant.optimizers.values():  # their state is allocated now
            step(contestant, work.device, optimizer)
        num = flops(lambda: forward_backward(contestant, work.device))
        contestant.module.zero_grad()
        saved = saved_bytes(lambda: forward(contestant, work.device), contestant.module, contestant.given)
        peaks = {name: peak_bytes(contestant, work.device, o) for name, o in contestant.optimizers.items()}
        if work.device.type == "cuda":
            for block in contestant.blocks:
                block.compile()
            step(contestant, work.device, next(iter(contestant.optimizers.values())))
    except torch.OutOfMemoryError:
        print(f"{contestant.name} is left out of {work.title}: out of memory")
        return None
    return Measured(contestant, num, saved, peaks, [])


def peak_bytes(contestant: Contestant, device: torch.device, optimizer: torch.optim.Optimizer) -> int:
    """Weights, the optimiser's state, and the most that a step allocates on top."""
    rise = peak_rise_bytes(lambda: step(contestant, device, optimizer), device)
    return rise + resident_bytes(contestant.module, optimizer)


def forward(contestant: Contestant, device: torch.device) -> torch.Tensor:
    """The loss; in bf16 on a GPU."""
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        return contestant.loss()


def forward_backward(contestant: Contestant, device: torch.device) -> None:
    """Leaves the gradients."""
    forward(contestant, device).backward()


def step(contestant: Contestant, device: torch.device, optimizer: torch.optim.Optimizer) -> None:
    """A whole step, without a clock."""
    forward_backward(contestant, device)
    optimizer.step()
    contestant.module.zero_grad()


def timed_step(contestant: Contestant, device: torch.device) -> dict[str, float]:
    """One forward and backward; then each optimiser takes its step on the same gradients."""
    spent = {"forward_backward": seconds(lambda: forward_backward(contestant, device), device), "guard": 0.0}
    if contestant.guard is not None:
        spent["guard"] = seconds(contestant.guard, device)
    for name, optimizer in contestant.optimizers.items():
        spent[name] = seconds(optimizer.step, device)
    contestant.module.zero_grad()
    return spent


def summary(entry: Measured, work: Work) -> Iterator[Cost]:
    """Medians, and where the time of ours goes."""
    contestant = entry.contestant
    spent = {name: median(s[name] for s in entry.seconds) for name in entry.seconds[0]}
    for label, optimizer in contestant.optimizers.items():
        shares = None
        if contestant.guard is not None:
            num_steps = min(len(entry.seconds), NUM_PROFILED)
            shares = time_shares(lambda o=optimizer: step(contestant, work.device, o), work.device, num_steps)
        yield Cost(
            work, contestant.key, label, f"{contestant.name}, {label}" if label else contestant.name,
            spent["forward_backward"], spent[label], spent["guard"], entry.flops, entry.saved_bytes / work.num_views,
            entry.peak_bytes[label], contestant.seen, contestant.asked, shares,
        )  # fmt: skip


# ---------------------------------------------------------------- telling


def report(costs: Sequence[Cost], best_rate: float) -> list[Row]:
    """Prints the tables of one work; returns their numbers."""
    rows = [row for cost in costs for row in rows_of(cost, costs[0], best_rate)]
    print_table(costs[0].work.title, COLUMNS, [line(cost, costs[0], best_rate) for cost in costs])
    print_where([cost for cost in costs if cost.shares])
    print_verdict(costs, best_rate)
    return rows


NOTE = """saved: MiB of activations of a view. peak: MiB, weights and the optimiser's state included.
seen, asked: patches of a view, each sequence counted. The recipe as it is asks for less than its rivals do: that its
step costs less is no statement about what it learns."""
COLUMNS = ("", "step s", "× umbif", "fwd+bwd s", "AdamW s", "GFLOP", "MFU", "saved", "peak", "seen", "asked")


def line(cost: Cost, ours: Cost, best_rate: float) -> tuple[str, ...]:
    """Of the table."""
    return (
        cost.name, f"{cost.step_s:.3f}", f"{cost.step_s / ours.step_s:.2f}", f"{cost.forward_backward_s:.3f}",
        f"{cost.optimizer_s:.3f}", f"{cost.flops / 1e9:.1f}", f"{mfu(cost, best_rate):.2f}",
        f"{cost.saved_bytes / MIB:.1f}", f"{cost.peak_bytes / MIB:.0f}", f"{cost.seen:g}", f"{cost.asked:g}",
    )  # fmt: skip


def mfu(cost: Cost, best_rate: float) -> float:
    """Share of the best rate that the model's own operations reach."""
    return cost.flops / cost.forward_backward_s / best_rate


def numbers(cost: Cost, best_rate: float) -> dict[str, tuple[float, str]]:
    """All that was measured, with its unit."""
    found = {
        "step": (cost.step_s, "s"), "forward and backward": (cost.forward_backward_s, "s"),
        "optimiser": (cost.optimizer_s, "s"), "operations": (cost.flops / 1e9, "GFLOP"),
        "MFU": (mfu(cost, best_rate), "share"), "saved activations of a view": (cost.saved_bytes / MIB, "MiB"),
        "peak memory": (cost.peak_bytes / MIB, "MiB"), "seen of a view": (cost.seen, "patches"),
        "asked of a view": (cost.asked, "patches"),
    }  # fmt: skip
    if cost.shares:
        groups = grouped(cost.shares).items()
        found |= {"guard": (cost.guard_s, "s"), **{f"time of {name}": (share, "share") for name, share in groups}}
    return found


def rows_of(cost: Cost, ours: Cost, best_rate: float) -> Iterator[Row]:
    """One row for each number, with how many times ours it is."""
    base = numbers(ours, best_rate)
    for name, (value, unit) in numbers(cost, best_rate).items():
        ratio = value / base[name][0] if base.get(name, (0.0,))[0] else None
        yield Row(f"{cost.work.title}: {name}", cost.name, value, unit, ratio)


if __name__ == "__main__":
    main()
