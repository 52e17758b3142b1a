"""Benchmarks: what they print and write, and that they count right. Never how fast anything is."""

import gc
import importlib
import json
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from umbif.stream.patches import patch_grid

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
CPU = torch.device("cpu")
MEASURES = {
    "step": "s", "forward and backward": "s", "optimiser": "s", "operations": "GFLOP", "MFU": "share",
    "saved activations of a view": "MiB", "peak memory": "MiB", "seen of a view": "patches",
    "asked of a view": "patches",
}  # fmt: skip


@pytest.fixture(scope="module")
def benchmark():
    """Imports a file of benchmarks/ by its name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        threads = torch.get_num_threads()
        yield importlib.import_module
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def quick(benchmark, tmp_path_factory):
    """What `step.py --quick` writes, by work, measure and contestant."""
    file = tmp_path_factory.mktemp("bench") / "step.json"
    benchmark("step").main(["--quick", "--json", str(file)])
    return json.loads(file.read_text())


# ---------------------------------------------------------------- what UMBIF costs beside the work


def test_three_loops_do_the_same_work(benchmark, tmp_path, capsys):
    file = tmp_path / "scale.json"
    assert benchmark("scale").main(["--quick", "--only", "loops", "--json", str(file)]) == 0  # it compares their losses
    rows = json.loads(file.read_text())["rows"]
    assert [row["contestant"] for row in rows] == 2 * ["umbif fit", "bare Lightning", "bare PyTorch"]
    assert [row["ratio"] for row in rows if row["contestant"] == "umbif fit"] == [1, 1]
    assert "Monitors" in capsys.readouterr().out


def test_bounds_that_are_not_kept_are_told(benchmark):
    scale, row = benchmark("scale"), benchmark("_report").Row
    kept = [row("a step, by the clock", "bare Lightning", 1.0, "s", 1.019), row("a step", "umbif fit", 1.0, "s", 1.0)]
    kept += [row(scale.SHARE, "beside training", 0.9, "%", None), row(scale.SHARE, "at once", 2.0, "%", None)]
    assert [*scale.missed(kept)] == []
    lost = [row("a step, by the clock", "bare PyTorch", 1.0, "s", 1.06)]
    assert len([*scale.missed([*lost, row(scale.SHARE, "beside training", 1.2, "%", None)])]) == 2


# ---------------------------------------------------------------- a whole run


def test_a_file_says_on_what_it_was_measured(quick):
    assert set(quick) == {"hardware", "commit", "rows"}
    assert quick["hardware"].endswith("cores")
    assert quick["commit"] is None or len(quick["commit"]) >= 7
    assert all(set(row) == {"work", "contestant", "value", "unit", "ratio"} for row in quick["rows"])


def test_every_contestant_has_every_number_of_every_work(quick, benchmark):
    rivals = ["MONAI", "MONAI", *(["VideoMAE"] if benchmark("_contestants").has_transformers() else [])]
    for work in ("ViT-tiny 48³, 1 sequence, 2 views", "ViT-tiny 48³, 4 sequences, 2 views"):
        for measure, unit in MEASURES.items():
            rows = [row for row in quick["rows"] if row["work"] == f"{work}: {measure}"]
            assert [row["contestant"].split()[0] for row in rows] == ["umbif", "umbif", *rivals]
            assert {row["unit"] for row in rows} == {unit}
            assert all(row["value"] > 0 for row in rows)
            assert [row["ratio"] for row in rows] == pytest.approx([row["value"] / rows[0]["value"] for row in rows])


def test_the_parts_of_a_step_are_the_whole(quick):
    timed = [row for row in quick["rows"] if ", 1 seq" in row["work"] and "time of" in row["work"]]
    for name in ("umbif", "umbif joint"):
        shares = [row["value"] for row in timed if row["contestant"] == name]
        assert len(shares) == 4
        assert sum(shares) == pytest.approx(1)


def test_goals_and_tables_are_printed(benchmark, capsys):
    benchmark("_verdict").print_verdict([], 1.0)
    benchmark("_report").print_table("Title", ("", "step s"), [("umbif", "1.0")])
    printed = capsys.readouterr().out
    assert "Goals" in printed
    assert "umbif" in printed


def test_a_goal_is_met_at_its_limit_and_not_beyond(benchmark):
    parts = benchmark("_contestants")
    cost = benchmark("step").Cost(
        parts.Work("B", 1, 2, 96, CPU), "umbif", "", "umbif", 1.0, 0.1, 0.0, 1, 1.0, 1, 1, 1, None
    )
    said = [benchmark("_verdict").told(cost, "x", value, 0.5, at_least=up)[-1] for value, up in
            ((0.5, False), (0.51, False), (0.5, True), (0.49, True))]  # fmt: skip
    assert said == ["met", "not met", "met", "not met"]


def test_an_odd_batch_is_refused(benchmark, capsys):
    with pytest.raises(SystemExit):
        benchmark("step").main(["--batch", "3"])
    assert "two views" in capsys.readouterr().err


# ---------------------------------------------------------------- who takes part


def test_equal_architectures_have_equally_many_weights_and_hide_as_much(benchmark):
    parts = benchmark("_contestants")
    work = parts.Work("tiny", 1, 2, 48, CPU)
    _, joint, *rivals = parts.contestants(work)
    count = {c.key: sum(p.numel() for p in c.module.parameters() if p.requires_grad) for c in (joint, *rivals)}
    assert all(count[rival.key] == pytest.approx(count["joint"], rel=0.02) for rival in rivals)
    assert {(c.seen, c.asked) for c in (joint, *rivals)} == {(6, 21)}  # int(27 / 4), and the others


def test_a_synthetic_brain_fills_a_crop_as_a_real_one_does(benchmark):
    parts = benchmark("_contestants")
    exams = parts.synthetic_exams(parts.Work("S", 1, 2, 96, CPU), parts.BALL)
    assert patch_grid(exams, 16).available.sum(1).tolist() == [184, 184]


# ---------------------------------------------------------------- what is counted


def test_attention_of_a_cpu_is_counted_forward_and_twice_backward(benchmark):
    q, k, v = (torch.randn(2, 3, 5, 8, requires_grad=True) for _ in range(3))
    attend = torch.nn.functional.scaled_dot_product_attention
    assert benchmark("_measure").flops(lambda: attend(q, k, v).sum().backward()) == 3 * 2 * (2 * 2 * 3 * 5 * 5 * 8)


def test_saved_activations_leave_out_weights_and_what_was_given(benchmark):
    saved_bytes, x = benchmark("_measure").saved_bytes, torch.randn(4, 16)
    net = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8))
    hidden, activated = 4 * 32 * 4, 4 * 32 * 4  # bytes that the second and the third layer keep
    assert saved_bytes(lambda: net(x).sum(), net, (x,)) == hidden + activated
    assert saved_bytes(lambda: net(x).sum(), net) == hidden + activated + 4 * 16 * 4


def test_a_look_at_saved_activations_keeps_nothing_alive(benchmark):
    def looked_at():
        net = nn.Sequential(nn.Linear(4, 4), nn.Softmax(-1))  # which saves what it returns
        benchmark("_measure").saved_bytes(lambda: net(torch.ones(1, 4)).sum(), net)
        return weakref.ref(net[0].weight)

    weight = looked_at()
    gc.collect()
    assert weight() is None


def test_the_peak_is_what_is_held_at_once(benchmark):
    def run():
        for _ in range(3):
            torch.empty(2**20, dtype=torch.uint8)  # gone before the next one
        both = torch.empty(2**20, dtype=torch.uint8), torch.empty(2**21, dtype=torch.uint8)
        del both

    assert benchmark("_measure").peak_rise_bytes(run, CPU) == 3 * 2**20


def test_the_products_of_a_profile_are_told_from_the_rest(benchmark):
    group_of = benchmark("_measure").group_of
    names = ("aten::addmm", "aten::_fused_adamw_", "aten::gelu", "aten::scaled_dot_product_attention")
    assert [group_of(name) for name in names] == ["matrix products", "optimiser", *["everything else"] * 2]
    for name in ("_scaled_dot_product_flash_attention_for_cpu", "_flash_attention_forward", "_cudnn_attention"):
        assert {group_of(f"aten::{name}"), group_of(f"aten::{name.removesuffix('_forward')}_backward")} == {"attention"}
