"""Recipes: what the files and the command line say is what the classes are given, and every mistake has a name."""

import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from umbif.errors import UsageError
from umbif.recipe.build import build, construct
from umbif.recipe.check import check
from umbif.recipe.compose import compose, read_tree
from umbif.recipe.files import find_recipe, list_recipes
from umbif.recipe.show import flat_copy, show

TOYS = """
from dataclasses import dataclass
from typing import Literal
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from torch import nn
from umbif.errors import Problem, UsageError

class Encoder(nn.Module):
    def __init__(self, embed_dim: int = 8, size: tuple[int, int, int] = (4, 4, 4),
                 act: Literal["gelu", "relu"] = "gelu"):
        super().__init__()
        self.embed_dim, self.size = embed_dim, size

class Conv(nn.Module):
    def __init__(self, width: int = 2):
        super().__init__()
        if width > 99:
            raise KeyError("wide")
        self.width = width

@dataclass
class Schedule:
    warmup: int = 1
    decay: float = 0.5

class Toy(LightningModule):
    def __init__(self, encoder: nn.Module, lr: float, mask_ratio: float = 0.75, decoder_dim: int | None = None,
                 schedule: Schedule = Schedule(), heads: list[nn.Module] = (), **kwargs):
        super().__init__(**kwargs)
        self.encoder, self.lr, self.mask_ratio, self.decoder_dim = encoder, lr, mask_ratio, decoder_dim
        self.schedule, self.tops = schedule, nn.ModuleList(heads)

@dataclass
class Phase:
    steps: int
    lr: float = 1.0

class Only(LightningModule):
    def __init__(self, encoder: Encoder, phase: Phase | None = None, phases: list[Phase] = ()):
        super().__init__()

class Data(LightningDataModule):
    def __init__(self, corpus: str, global_batch_size: int = 4, names: list[str] | None = None):
        super().__init__()
        self.corpus, self.global_batch_size, self.names = corpus, global_batch_size, names

class Beat(Callback):
    def __init__(self, every_n_steps: int = 1):
        if every_n_steps < 1:
            raise UsageError(Problem("every_n_steps must be positive", str(every_n_steps)))
        self.every_n_steps = every_n_steps

@dataclass
class Settings:
    spacing_mm: float = 1.0
    align: str = "rigid"

def count(folder: str, step: int = 2) -> str:
    return folder * step
"""

DATA = """
data:
  class_path: recipe_toys.Data
  corpus: /corpus
  global_batch_size: 4
"""

CPU = """
trainer: {accelerator: cpu, devices: 1, max_steps: 5}
"""

GPU = """
trainer: {accelerator: gpu, devices: 8}
"""

TINY = """# Tiny. He et al. 2022
#   umbif fit pretrain/tiny
about: {summary: a toy, paper: "arXiv:2111.06377"}
include: [_parts/data/toy.yaml, _parts/hardware/cpu.yaml]
run: {dir: runs/tiny}
model:
  class_path: recipe_toys.Toy
  encoder:
    class_path: recipe_toys.Encoder
    embed_dim: 16  # channels
    size: [2, 2, 2]
  lr: 1e-4  # per 256 volumes
  decoder_dim: ${model.encoder.embed_dim}
trainer:
  max_steps: 7
callbacks:
  beat: {class_path: recipe_toys.Beat, every_n_steps: 3}
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "recipes"
    write(folder / "_parts/data/toy.yaml", DATA)
    write(folder / "_parts/hardware/cpu.yaml", CPU)
    write(folder / "_parts/hardware/gpu.yaml", GPU)
    write(folder / "pretrain/tiny.yaml", TINY)
    write(folder / "prepare/one.yaml", "class_path: recipe_toys.Settings\nspacing_mm: 2\n")
    monkeypatch.setattr("umbif.recipe.files.recipe_roots", lambda: [folder])
    return folder


@pytest.fixture(scope="module", autouse=True)
def toys(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("toys")
    write(folder / "recipe_toys.py", TOYS)
    write(folder / "recipe_broken.py", "import a_package_that_is_not_there\n")
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def problems_of(name: str, *overrides: str) -> list[str]:
    return [str(problem) for problem in check(compose(name, overrides))]


# ---------------------------------------------------------------- composing


def test_a_part_gives_way_to_the_recipe_and_the_recipe_to_the_command_line(root):
    assert compose("pretrain/tiny").tree["trainer"] == {"accelerator": "cpu", "devices": 1, "max_steps": 7}
    assert compose("pretrain/tiny", ["trainer.max_steps=9"]).tree["trainer"]["max_steps"] == 9


def test_parts_are_merged_in_the_order_of_the_list(root):
    write(root / "two.yaml", "include: [_parts/hardware/cpu.yaml, _parts/hardware/gpu.yaml]\n")
    assert compose("two").tree["trainer"] == {"accelerator": "gpu", "devices": 8, "max_steps": 5}


def test_an_override_flows_into_interpolations_of_other_files(root):
    write(root / "_parts/data/toy.yaml", DATA + "  names: ['${run.dir}/a']\n")
    recipe = compose("pretrain/tiny", ["model.encoder.embed_dim=32", "run.dir=runs/other"])
    assert recipe.tree["model"]["decoder_dim"] == 32
    assert recipe.tree["data"]["names"] == ["runs/other/a"]


@pytest.mark.parametrize("text", ["1e-4", "1.5e-4", "3E-2", "1e4"])
def test_a_number_without_a_dot_is_a_float_in_files_and_overrides(root, text):
    write(root / "pretrain/tiny.yaml", TINY.replace("lr: 1e-4", f"lr: {text}"))
    for value in (
        compose("pretrain/tiny").tree["model"]["lr"],
        compose("pretrain/tiny", [f"model.lr={text}"]).tree["model"]["lr"],
    ):
        assert isinstance(value, float)
        assert value == float(text)


def test_lists_are_replaced_whole_and_null_is_a_value(root):
    tree = compose("pretrain/tiny", ["model.encoder.size=[4,5,6]", "model.decoder_dim=null"]).tree
    assert tree["model"]["encoder"]["size"] == [4, 5, 6]
    assert tree["model"]["decoder_dim"] is None


def test_another_class_path_takes_the_old_arguments_away(root):
    changes = ["model.encoder.width=3", "model.encoder.class_path=recipe_toys.Conv", "model.decoder_dim=1"]
    recipe = compose("pretrain/tiny", changes)
    assert recipe.tree["model"]["encoder"] == {"class_path": "recipe_toys.Conv", "width": 3}
    assert "model.encoder.embed_dim" not in recipe.origins
    same = compose("pretrain/tiny", ["model.encoder.class_path=recipe_toys.Encoder"])
    assert same.tree["model"]["encoder"]["embed_dim"] == 16


def test_init_args_may_be_written_or_left_out(root):
    spelt = TINY.replace("  lr: 1e-4", "  init_args:\n    lr: 1e-4")
    spelt = spelt.replace("  decoder_dim: ${model.enc", "    decoder_dim: ${model.init_args.enc")
    write(root / "pretrain/spelt.yaml", spelt)
    assert compose("pretrain/spelt").tree["model"] == compose("pretrain/tiny").tree["model"]
    assert compose("pretrain/tiny", ["model.init_args.lr=1"]).tree["model"]["lr"] == 1


def test_hardware_swaps_the_part_and_the_recipe_still_wins(root):
    assert compose("pretrain/tiny", ["hardware=gpu"]).tree["trainer"] == {
        "accelerator": "gpu",
        "devices": 8,
        "max_steps": 7,
    }


def test_hardware_takes_effect_on_a_recipe_without_a_part(root, tmp_path):
    mine = flat_copy("pretrain/tiny", tmp_path / "mine")
    tree = compose(str(mine), ["hardware=gpu", "trainer.devices=2"]).tree
    assert (tree["trainer"]["accelerator"], tree["trainer"]["devices"]) == ("gpu", 2)


def test_run_defaults_follow_the_name(root):
    recipe = compose("prepare/one")
    assert recipe.tree["run"] == {"dir": "runs/prepare/one", "seed": 0}
    assert recipe.origins["run.dir"] == "default"


def test_origins_name_the_file_or_the_command_line(root):
    origins = compose("pretrain/tiny", ["model.lr=1", "hardware=gpu"]).origins
    assert origins["data.corpus"] == "_parts/data/toy.yaml"
    assert origins["trainer.devices"] == "_parts/hardware/gpu.yaml"
    assert origins["trainer.max_steps"] == origins["model.decoder_dim"] == "pretrain/tiny.yaml"
    assert origins["model.lr"] == "command line"


# ---------------------------------------------------------------- refusing


def test_an_unknown_name_gets_the_nearest(root):
    with pytest.raises(UsageError, match=r"no such recipe: got pretrain/tinny.*pretrain/tiny\?"):
        compose("pretrain/tinny")
    with pytest.raises(UsageError, match=r"no such part in _parts/hardware: got gpus.yaml.*gpu.yaml\?"):
        compose("pretrain/tiny", ["hardware=gpus"])
    with pytest.raises(UsageError, match="no such recipe"):
        find_recipe("_parts/data/toy")
    with pytest.raises(UsageError, match="no such group"):
        list_recipes("pretrian")


def test_bad_overrides_are_told_together(root):
    with pytest.raises(UsageError) as error:
        compose("pretrain/tiny", ["foo", "=3", "model..lr=2", "model.lr=[1,", "model.lr=${a"])
    assert len(error.value.problems) == 5
    assert "model.lr=1e-4" in str(error.value)


def test_interpolations_that_lead_nowhere_are_told_together(root):
    with pytest.raises(UsageError) as error:
        compose("pretrain/tiny", ["model.mask_ratio=${model.lrr}", "data.corpus=${nowhere.at}/x", "run.dir=${run.dir}"])
    first, second, third = sorted(map(str, error.value.problems))
    assert first.startswith("data.corpus refers to nowhere.at, which is not set. Give it: nowhere.at=VALUE")
    assert second == "model.mask_ratio refers to model.lrr, which is not set. Did you mean model.lr?"
    assert third.startswith("run.dir cannot be resolved")


def test_a_circle_through_a_block_is_an_error(root):
    with pytest.raises(UsageError, match="circle"):
        compose("pretrain/tiny", ["model.schedule={decay: '${data}'}", "data.names={a: '${model}'}"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1\n", "cannot be read as YAML: .*line 2"),
        ("a: 1\na: 2\n", "duplicate key"),
        ("- 1\n", "must hold keys and values"),
        ("include: _parts/data/toy.yaml\n", "include must be a list"),
        ("include: [_parts/data/tyo.yaml]\n", r"no such part in _parts/data: .*Did you mean toy.yaml\?"),
        ("include: [_parts/data/nested.yaml]\n", "a part must not include others"),
    ],
)
def test_a_bad_file_is_an_error_of_the_user(root, text, message):
    write(root / "_parts/data/nested.yaml", "include: [_parts/data/toy.yaml]\n")
    with pytest.raises(UsageError, match=message):
        compose(str(write(root.parent / "bad.yaml", text)))


# ---------------------------------------------------------------- showing and copying


def test_parts_are_hidden_and_groups_are_listed(root):
    assert list_recipes() == ["prepare/one", "pretrain/tiny"]
    assert list_recipes("pretrain") == ["pretrain/tiny"]


def test_show_names_the_origin_of_every_value_in_one_column(root):
    text = show(compose("pretrain/tiny", ["model.lr=2e-5"]))
    lines = text.splitlines()
    assert any(line.split() == ["lr:", "2.0e-05", "#", "command", "line"] for line in lines)
    assert any(line.split() == ["corpus:", "/corpus", "#", "_parts/data/toy.yaml"] for line in lines)
    assert any(line.startswith("  decoder_dim: 16") for line in lines)
    assert len({line.index(" # ") for line in lines if " # " in line}) == 1


def test_the_resolved_text_reads_back_as_the_same_tree(root, tmp_path):
    odd = ["data.names=['1e-4','a: b','null','x #y','',' z','é','???no']", "data.corpus='off'", "model.lr=1e-7"]
    recipe = compose("pretrain/tiny", odd)
    again = compose(str(write(tmp_path / "run" / "recipe.yaml", recipe.to_yaml())))
    assert again.tree == recipe.tree == read_tree(again.path)
    assert again.about == recipe.about == {"summary": "a toy", "paper": "arXiv:2111.06377"}
    assert OmegaConf.to_container(OmegaConf.create(show(recipe)))["data"] == recipe.tree["data"]


def test_a_flat_copy_composes_to_the_original_and_keeps_what_people_wrote(root, tmp_path):
    copy = flat_copy("pretrain/tiny", tmp_path / "new" / "mine")
    text = copy.read_text()
    assert copy.name == "mine.yaml"
    assert text.startswith("# Tiny. He et al. 2022\n#   umbif fit pretrain/tiny\nabout:")
    assert "include" not in text
    assert any(line.split("#")[-1].strip() == "channels" and "embed_dim: 16" in line for line in text.splitlines())
    original, mine = compose("pretrain/tiny"), compose(str(copy), ["model.encoder.embed_dim=3"])
    assert compose(str(copy)).tree == original.tree
    assert compose(str(copy)).about == original.about
    assert mine.tree["model"]["decoder_dim"] == 3
    with pytest.raises(UsageError, match="not overwritten"):
        flat_copy("pretrain/tiny", copy)


def test_composing_imports_neither_torch_nor_lightning():
    code = "import sys, umbif.recipe.compose, umbif.recipe.build as _; print({'torch', 'lightning'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# ---------------------------------------------------------------- checking


def test_a_good_recipe_has_no_problem(root):
    assert problems_of("pretrain/tiny") == []
    assert problems_of("pretrain/tiny", "model.lr=1", "trainer.precision=bf16-mixed", "callbacks=null") == []


def test_all_problems_come_at_once_under_the_names_people_write(root):
    found = problems_of(
        "pretrain/tiny",
        "model.mask_ration=0.5",
        "model.lr=abc",
        "model.decoder_dim=x",
        "model.encoder.embed_dm=3",
        "model.encoder.size=[1,2]",
        "model.encoder.act=gelo",
        "model.schedule={warmup: x, decy: 1}",
        "data.corpus=7",
        "data.global_batch_size=2.5",
        "trainer.max_stepz=3",
        "trainer.precision=bf16-mixd",
        "callbacks.beat.every=3",
        "callbacks.odd={class_path: recipe_toys.Data, corpus: x}",
        "modle.lr=3",
        "run.sed=3",
    )
    assert sorted(found) == sorted(
        [
            "unknown key model.mask_ration. Did you mean mask_ratio?",
            "model.lr: expected float: got 'abc'",
            "model.decoder_dim: expected int or null: got 'x'",
            "unknown key model.encoder.embed_dm. Did you mean embed_dim?",
            "model.encoder.size: expected tuple with 3 elements: got [1, 2]",
            "model.encoder.act: expected one of 'gelu', 'relu': got 'gelo'. Did you mean gelu?",
            "model.schedule.warmup: expected int: got 'x'",
            "unknown key model.schedule.decy. Did you mean decay?",
            "data.corpus: expected str: got 7",
            "data.global_batch_size: expected int: got 2.5",
            "unknown key trainer.max_stepz. Did you mean max_steps?",
            next(line for line in found if line.startswith("trainer.precision: expected int or one of")),
            "unknown key callbacks.beat.every. Valid: every_n_steps.",
            "callbacks.odd must be a Callback: got recipe_toys.Data",
            "unknown key modle. Did you mean model?",
            "unknown key run.sed. Did you mean seed?",
        ]
    )
    assert "Did you mean bf16-mixed?" in next(line for line in found if "precision" in line)


def test_missing_values_and_classes_are_problems(root):
    write(root / "bare.yaml",
          "model: {class_path: recipe_toys.Toy}\ndata:\n  class_path: recipe_toys.Data\n  corpus: ???\n")  # fmt: skip
    assert problems_of("bare") == [
        "data.corpus has no value yet. Give it: data.corpus=VALUE",
        "model.encoder is required. Give it: model.encoder=VALUE",
        "model.lr is required. Give it: model.lr=VALUE",
    ]
    assert problems_of("bare", "model=null", "data.corpus=x") == [
        "model is missing. Name its class: model.class_path=…"
    ]
    assert problems_of("pretrain/tiny", "model.lr=null") == ["model.lr needs a value: got null"]


@pytest.mark.parametrize(
    ("class_path", "message"),
    [
        ("recipe_toys.Encodr", "recipe_toys has no Encodr: got recipe_toys.Encodr. Did you mean Encoder?"),
        ("umbif.recip.X", "umbif has no recip: got umbif.recip.X. Did you mean recipe?"),
        ("recipe_broken.X", "recipe_broken needs a package that is not installed: got a_package_that_is_not"),
        ("no_such_package.X", "no such package: got no_such_package"),
        ("Encoder", "not an import path: got 'Encoder'"),
    ],
)  # fmt: skip
def test_a_class_that_cannot_be_found_is_a_problem(root, class_path, message):
    found = problems_of("pretrain/tiny", f"model.encoder.class_path={class_path}", "model.decoder_dim=1")
    assert len(found) == 1
    assert found[0].startswith(f"model.encoder.class_path: {message}")


def test_a_class_of_the_wrong_kind_is_a_problem(root):
    only = ["model={class_path: recipe_toys.Only, encoder: {class_path: recipe_toys.Conv}}"]
    assert problems_of("pretrain/tiny", *only) == ["model.encoder: expected class Encoder: got recipe_toys.Conv"]
    assert problems_of("pretrain/tiny", "model.heads=[{class_path: recipe_toys.Conv, wdth: 1}]") == [
        "unknown key model.heads[0].wdth. Did you mean width?"
    ]
    assert problems_of("pretrain/tiny", "model.encoder=3", "model.decoder_dim=1") == [
        "model.encoder: expected class_path and its arguments: got 3"
    ]
    assert problems_of("pretrain/tiny", "include=[x]") == [
        "unknown key include. Valid: callbacks, data, model, run, trainer."
    ]
    assert problems_of("pretrain/tiny", "trainer=3") == ["trainer must hold keys and values: got 3"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.phase={lr: 2}", "model.phase.steps is required. Give it: model.phase.steps=VALUE"),
        ("model.phase={steps: x, lr: 2}", "model.phase.steps: expected int: got 'x'"),
        ("model.phase={steps: 1, z: 2}", "unknown key model.phase.z"),
        ("model.phases=[{steps: 1, z: 2}]", "unknown key model.phases.z"),
    ],
)
def test_blocks_of_settings_are_checked_inside(root, override, message):
    only = "model={class_path: recipe_toys.Only, encoder: {class_path: recipe_toys.Encoder}}"
    assert problems_of("pretrain/tiny", only) == []
    assert problems_of("pretrain/tiny", only, override) == [message]


def test_a_recipe_of_one_class_is_checked_and_built_in_the_same_way(root):
    assert problems_of("prepare/one", "spacing=1", "align=3") == [
        "unknown key spacing. Did you mean spacing_mm?",
        "align: expected str: got 3",
    ]
    settings = construct(compose("prepare/one", ["align=affine"]))
    assert (settings.spacing_mm, settings.align) == (2.0, "affine")
    write(root / "prepare/two.yaml", "class_path: recipe_toys.count\nfolder: ab\n")
    assert construct(compose("prepare/two")) == "abab"


# ---------------------------------------------------------------- building


def test_what_is_built_holds_the_values_of_the_recipe(root):
    simple = "trainer.profiler={class_path: lightning.pytorch.profilers.SimpleProfiler, filename: x}"
    heads = "model.heads=[{class_path: recipe_toys.Conv, width: 5}]"
    built = build(compose("pretrain/tiny", ["model.lr=1", "model.schedule.warmup=9", "run.seed=4", simple, heads]))
    assert (built.model.lr, built.model.decoder_dim, built.model.encoder.size) == (1.0, 16, (2, 2, 2))
    assert (built.model.schedule.warmup, built.model.schedule.decay) == (9, 0.5)
    assert built.model.tops[0].width == 5
    assert built.data.corpus == "/corpus"
    assert built.callbacks["beat"].every_n_steps == 3
    assert built.trainer_args.pop("profiler").__class__.__name__ == "SimpleProfiler"
    assert built.trainer_args == {"accelerator": "cpu", "devices": 1, "max_steps": 7}
    assert (built.run.dir, built.run.seed) == ("runs/tiny", 4)


def test_what_the_trainer_is_given_anyway_is_refused_with_what_to_set_instead(root):
    assert problems_of("pretrain/tiny", "trainer.logger=false", "trainer.gradient_clip_val=1", "trainer.devises=2") == [
        "trainer.logger is no value of a recipe. metrics.csv and TensorBoard are written always",
        "trainer.gradient_clip_val is no value of a recipe. Set model.gradient_clip",
        "unknown key trainer.devises. Did you mean devices?",
    ]


def test_a_callback_set_to_null_is_dropped(root):
    built = build(compose("pretrain/tiny", ["callbacks.beat=null"]))
    assert built.callbacks == {}


def test_building_twice_leaves_the_recipe_as_it_was(root):
    recipe = compose("pretrain/tiny", ["model.heads=[{class_path: recipe_toys.Conv}]"])
    before = recipe.to_yaml()
    assert build(recipe).model is not build(recipe).model
    assert recipe.to_yaml() == before


def test_building_a_wrong_recipe_tells_what_check_tells(root):
    with pytest.raises(UsageError, match=r"unknown key model\.lrr"):
        build(compose("pretrain/tiny", ["model.lrr=1"]))


def test_what_a_constructor_says_reaches_people_unchanged(root):
    with pytest.raises(UsageError, match=r"^every_n_steps must be positive: got 0$"):
        build(compose("pretrain/tiny", ["callbacks.beat.every_n_steps=0"]))
    with pytest.raises(KeyError, match="wide"):
        build(compose("pretrain/tiny", ["model.heads=[{class_path: recipe_toys.Conv, width: 100}]"]))
