"""The goals of the step beside what was measured. They were set on one thread of an AVX2 CPU; nothing is asserted."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from _measure import STEP, group_of, grouped
from _report import print_table

if TYPE_CHECKING:
    from step import Cost

EQUAL = {"B": {"default": 0.87, "fused": 0.95}}  # times MONAI's step, joint decoder
RECIPE = {"S": {"default": 0.40, "fused": 0.45}, "B": {"default": 0.52, "fused": 0.60}}  # the recipe as it is
SEVERAL = {"S": {"default": 0.80}, "B": {"default": 0.80}}  # the recipe as it is, more than one sequence
NUM_OTHERS = 8  # operators that are named beside the groups
Line = tuple[str, str, str, str]


def print_verdict(costs: "Sequence[Cost]", best_rate: float) -> None:
    """One line for each goal."""
    lines: list[Line] = []
    for work in dict.fromkeys(cost.work for cost in costs):
        lines += lines_of({(c.key, c.optimizer): c for c in costs if c.work == work}, best_rate)
    print_table("Goals", ("", "goal", "measured", ""), lines)


def lines_of(found: "dict[tuple[str, str], Cost]", best_rate: float) -> Iterator[Line]:
    """Of one work."""
    ours, joint = found.get(("umbif", "")), found.get(("joint", ""))
    for cost in (ours, joint):
        if cost is not None:
            yield from against_monai(cost, found)
    for cost, limit in ((ours, 0.55), (joint, 0.60)):
        if cost is not None:
            share = grouped(cost.shares or {})["matrix products"]
            yield told(cost, "matrix products' share of the step", share, 0.75, at_least=True)
            yield told(cost, "optimiser's share of the step", cost.optimizer_s / cost.step_s, 0.08)
            yield told(cost, "MFU", cost.flops / cost.forward_backward_s / best_rate, limit, at_least=True)
    if ours is not None and (monai := found.get(("monai", "default"))):
        yield told(ours, "saved activations of a view / MONAI", ours.saved_bytes / monai.saved_bytes, 0.5)


def against_monai(cost: "Cost", found: "dict[tuple[str, str], Cost]") -> Iterator[Line]:
    """The step beside MONAI's, where there is a goal."""
    recipe = RECIPE if cost.work.num_sequences == 1 else SEVERAL
    goals = recipe if cost.key == "umbif" else EQUAL if cost.work.num_sequences == 1 else {}
    for optimizer, limit in goals.get(cost.work.size, {}).items():
        if rival := found.get(("monai", optimizer)):
            yield told(cost, f"step / MONAI, {optimizer}", cost.step_s / rival.step_s, limit)


def told(cost: "Cost", what: str, value: float, limit: float, *, at_least: bool = False) -> Line:
    """A goal in words."""
    met = value >= limit if at_least else value <= limit
    where = f"ViT-{cost.work.size}, {cost.work.num_sequences} seq., {cost.name}: {what}"
    return where, f"{'≥' if at_least else '≤'} {limit:.2f}", f"{value:.3f}", "met" if met else "not met"


def print_where(costs: "Sequence[Cost]") -> None:
    """Where the time of a step goes, by the profiler."""
    if not costs:
        return
    shares = [cost.shares or {} for cost in costs]
    groups = [grouped(found) for found in shares]
    lines = [(name, *(f"{found[name]:.1%}" for found in groups)) for name in groups[0]]
    others = {name for found in shares for name in found if group_of(name) == "everything else"}
    largest = sorted(others, key=lambda name: -max(found.get(name, 0.0) for found in shares))[:NUM_OTHERS]
    lines += [(f"  {spoken(name)}", *(f"{found.get(name, 0.0):.1%}" for found in shares)) for name in largest]
    lines.append(("AdamW, by the clock", *(f"{cost.optimizer_s / cost.step_s:.1%}" for cost in costs)))
    lines.append(("guard, by the clock, beside the step", *(f"{cost.guard_s / cost.step_s:.1%}" for cost in costs)))
    print_table(f"Where the step goes: {costs[0].work.title}", ("", *(cost.name for cost in costs)), lines)


def spoken(operator: str) -> str:
    """What no operator took is Python's."""
    return "Python, between operators" if operator == STEP else operator.removeprefix("aten::")
