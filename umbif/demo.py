"""The whole way on a laptop: what `umbif demo` does, each step the same function that its verb calls."""

import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from umbif.corpus.index import build_manifest
from umbif.corpus.manifest import read_manifest, write_manifest
from umbif.corpus.phantom import write_phantom
from umbif.corpus.prepare import merge, prepare_corpus
from umbif.corpus.shards import Corpus
from umbif.errors import Problem, UsageError
from umbif.evaluation.report import write_report
from umbif.files import read_mapping, write_text
from umbif.fit import fit
from umbif.progress import console
from umbif.recipe.build import construct
from umbif.recipe.compose import compose

NUM_EXAMS = 200
TEST_FRACTION = 0.4  # of the people: with fewer the intervals would say nothing
SPACING_MM = 2.0
TASKS = ("idh", "codeletion", "mgmt", "progression")
ARMS = {"pretrained": "pretrain", "untrained": None}  # model name → the run whose encoder it starts from
NOTES = (
    "These exams are synthetic. The page shows that the machinery works and makes no clinical claim.",
    "Labels change how the lesions look, each with a strength that docs/phantom.md lists; that of MGMT is weak on "
    "purpose, as careful studies of real exams find it.",
    "Pretrained and untrained are the same network with the same fine-tuning. A gain over untrained is not yet "
    "evidence for pretraining: a network trained on shuffled voxels can show one too.",
)
CAPTION = "a held-out exam, the quarter of it that the encoder saw, and what it predicted."
NULL_NOTE = "The labels were shuffled between exams: nothing can be learnt, and every task has to come out at chance."


def run_demo(out: Path, *, null: bool = False, num_exams: int = NUM_EXAMS, overrides: Sequence[str] = ()) -> Path:
    """Phantoms, index, corpus, pretraining, four tasks with and without pretraining, report.

    Every step that has been done is left as it is, so the same command goes on where it stopped.

    Args:
        out: Where everything goes.
        null: Shuffle the labels.
        num_exams: Phantoms.
        overrides: For every training recipe.

    Returns:
        The report.
    """
    out.mkdir(parents=True, exist_ok=True)
    _check_same_kind(out, null)
    _step("1/5  Synthetic exams")
    manifest = _manifest(out, null, num_exams)
    _step("2/5  Corpus")
    corpus = _corpus(out, manifest)
    _step("3/5  Pretraining")
    shared = [f"data.corpus={corpus}", *overrides]
    fit(compose("pretrain/umbif_tiny", [*shared, f"run.dir={out / 'pretrain'}"]))
    runs = []
    for number, task in enumerate(TASKS, start=1):
        for arm, source in ARMS.items():
            _step(f"4/5  Fine-tuning, task {number} of {len(TASKS)}: {task}, {arm}")
            weights = str(out / source) if source else "null"
            own = [f"run.dir={out / f'{task}_{arm}'}", f"model.encoder.weights={weights}", f"model.model_name={arm}"]
            runs.append(fit(compose(f"demo/{task}", [*shared, *own])))
    _step("5/5  Report")
    return _report(out, manifest, runs, null)


def _step(title: str) -> None:
    console.print(f"\n[bold]{title}[/bold]")


def _check_same_kind(out: Path, null: bool) -> None:
    """Shuffled and true labels must not meet in one folder."""
    path = out / "demo.json"
    cure = "Choose another folder with -o"
    if path.exists() and read_mapping(path, cure).get("null") != null:
        raise UsageError(Problem(f"{out} holds a demo {'without' if null else 'with'} --null", cure=cure))
    write_text(path, json.dumps({"null": null}))


def _manifest(out: Path, null: bool, num_exams: int) -> pd.DataFrame:
    path = out / "manifest.parquet"
    labels = write_phantom(out / "phantom", num_exams, spacing_mm=SPACING_MM, null=null)
    if not path.exists():
        write_manifest(
            build_manifest([out / "phantom"], dataset="phantom", labels=labels, test_fraction=TEST_FRACTION), path
        )
    return read_manifest(path)


def _corpus(out: Path, manifest: pd.DataFrame) -> Path:
    folder = out / "corpus"
    prepare_corpus(manifest, folder, construct(compose("prepare/brain_2mm")))
    console.print(merge(manifest, folder))
    return folder


def _report(out: Path, manifest: pd.DataFrame, runs: list[Path], null: bool) -> Path:
    exams = Corpus(out / "corpus").exams
    images = manifest[manifest["role"] == "image"]
    bad = manifest[manifest["status"] != "ok"]
    cohort = {
        "volumes": len(images),
        "exams": len(exams),
        "persons": exams["person"].nunique(),
        "quarantined": bad["reason"].value_counts().to_dict(),
        "split": exams["split"].value_counts().to_dict(),
    }
    pictures = sorted((out / "pretrain" / "figures").glob("reconstruction_*.png"))
    figures = [(f"{p.stem.removeprefix('reconstruction_')}: {CAPTION}", p) for p in pictures]
    notes = [*NOTES, NULL_NOTE] if null else NOTES
    return write_report(
        runs, out / "report.html", title="UMBIF on synthetic gliomas", notes=notes, figures=figures[:2], cohort=cohort
    )
