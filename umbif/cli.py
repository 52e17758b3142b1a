"""The verbs of the command line. Thin: each says what it does, calls one function, and names the next command.

Heavy libraries are imported inside the verbs, so that `umbif --help` answers at once.
"""

import shlex
import signal
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from umbif import __version__
from umbif.errors import UNEXPECTED, Problem, Stopped, UmbifError, UsageError, nearest
from umbif.files import refused
from umbif.machine import is_child, is_first_here, is_launched, is_leader
from umbif.progress import console

INTERRUPTED = 128 + signal.SIGINT
app = typer.Typer(
    name="umbif",
    help="From folders of brain MRI to a pretrained 3D encoder and its clinical evaluation.",
    epilog="First look, on any laptop:  umbif demo",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=True,
)

RecipeName = Annotated[str, typer.Argument(help="A name from `umbif ls`, or a YAML file of your own.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value …, as in trainer.max_steps=500")]


def example(*lines: str) -> str:
    """Worked examples for the end of a verb's help, one paragraph a line."""
    return "\n\n".join(["[bold]Examples[/bold]", *(f"  {line}" for line in lines)])


@app.command(epilog=example("umbif ls", "umbif ls pretrain"))
def ls(group: Annotated[str | None, typer.Argument(help="prepare, pretrain, finetune or demo")] = None) -> None:
    """Lists the recipes."""
    from rich.table import Table

    from umbif.recipe.compose import compose
    from umbif.recipe.files import list_recipes

    names = list_recipes(group)
    table = Table(box=None, pad_edge=False)
    table.add_column("recipe", min_width=max(map(len, names)))
    for column in ("what it does", "hardware"):
        table.add_column(column)
    for name in names:
        about = compose(name).about
        table.add_row(name, str(about.get("summary", "")), str(about.get("hardware", "")))
    console.print(table)
    following("umbif show RECIPE", "umbif cp RECIPE mine.yaml")


@app.command(epilog=example("umbif show pretrain/umbif_tiny", "umbif show pretrain/umbif_tiny hardware=1gpu"))
def show(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Shows a recipe with everything filled in, and where each value comes from."""
    from umbif.recipe.compose import compose
    from umbif.recipe.show import show as rendered

    print(rendered(compose(recipe, overrides or [])))
    following(typed("umbif", "check", recipe))


@app.command(epilog=example("umbif cp pretrain/umbif_vitb mine.yaml", "umbif fit mine.yaml"))
def cp(recipe: RecipeName, dest: Annotated[Path, typer.Argument(help="The new file.")]) -> None:
    """Copies a recipe into one file that depends on nothing else, to edit."""
    from umbif.recipe.show import flat_copy

    written = flat_copy(recipe, dest)
    print(f"Wrote {written}")
    following(typed("umbif", "check", written), typed("umbif", "fit", written))


@app.command(epilog=example("umbif check pretrain/umbif_vitb data.corpus=corpus"))
def check(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Finds what would fail, before it costs an hour: names, types, folders, one batch."""
    from umbif.check import check_recipe
    from umbif.recipe.compose import compose

    composed = compose(recipe, overrides or [])
    print(check_recipe(composed))
    verb = ["fit", recipe] if "model" in composed.tree else ["prepare", "manifest.parquet", "--recipe", recipe]
    following(typed("umbif", *verb, *(overrides or [])))


@app.command(
    epilog=example(
        "umbif index /data/BraTS2021 -o manifest.parquet",
        "umbif index /data/UCSF-PDGM --labels metadata.csv -o manifest.parquet",
        "umbif index a/images b/images --dataset A --dataset B --labels a.csv --labels b.csv",
        "umbif index /data/export --layout '{subject}/{session}/**'",
    )
)
def index(
    source: Annotated[list[Path], typer.Argument(help="Folders of NIfTI files.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The manifest.")] = Path("manifest.parquet"),
    dataset: Annotated[
        list[str] | None,
        typer.Option(help="Name of the data set: once for all sources, or for each, in order. Default: the folder's."),
    ] = None,
    labels: Annotated[
        list[Path] | None,
        typer.Option(
            help="A table (csv, tsv, parquet) with a row per subject or session; again for more. Given as often as "
            "--dataset (twice or more), each is of one data set, in that order; else each is of all."
        ),
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(
            help="Where paths below SOURCE have subject and session, as '{subject}/*/{session}/**': * is anything in "
            "one name, ** anything. Files that do not fit are set aside. Default: read from the names."
        ),
    ] = None,
    test_fraction: Annotated[float, typer.Option(help="Share held out, of people whose split no label gives.")] = 0.2,
    seed: Annotated[int, typer.Option(help="Of the split.")] = 0,
    workers: Annotated[int | None, typer.Option(min=0, help="Processes. Default: all cores, 16 at most.")] = None,
) -> None:
    """Reads every volume of a folder tree, checks it, groups exams, splits people. Goes on where it stopped."""
    from umbif.corpus.index import build_manifest, refuse_without_images, summary
    from umbif.corpus.manifest import write_manifest

    table = build_manifest(
        source, dataset=dataset, labels=labels or (), test_fraction=test_fraction, seed=seed, num_workers=workers,
        output=output, layout=layout,
    )  # fmt: skip
    earlier = write_manifest(table, output)
    print(summary(table))
    if earlier is not None:
        print(f"The manifest that stood there is now {earlier}")
    refuse_without_images(table, output)
    following(typed("umbif", "prepare", output, "-o", "corpus"))


@app.command(
    epilog=example(
        "umbif prepare manifest.parquet -o corpus",
        "umbif prepare manifest.parquet -o corpus --recipe prepare/brain_2mm",
        "umbif prepare manifest.parquet -o corpus --part 3/16      one task of an array",
        "umbif prepare manifest.parquet -o corpus --merge          when all parts have ended",
    )
)
def prepare(
    manifest: Annotated[Path, typer.Argument(help="What umbif index wrote.")],
    overrides: Overrides = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="The corpus' folder.")] = Path("corpus"),
    recipe: Annotated[str, typer.Option(help="A recipe of the group prepare/.")] = "prepare/brain_1mm",
    part: Annotated[str | None, typer.Option(help="I/N: prepare one of N parts, publish nothing.")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Publish the parts that were prepared.")] = False,
    workers: Annotated[int | None, typer.Option(min=0, help="Processes. Default: all cores.")] = None,
) -> None:
    """Makes a corpus of a manifest: one grid an exam, cut to the brain, compressed. Goes on where it stopped."""
    from umbif.corpus import prepare as engine
    from umbif.corpus.manifest import read_manifest
    from umbif.recipe.build import construct
    from umbif.recipe.compose import compose
    from umbif.recipe.files import list_recipes

    composed = compose(recipe, overrides or [])
    if "class_path" not in composed.tree:
        cure = f"{nearest(recipe, list_recipes('prepare'))} See them:  umbif ls prepare"
        raise UsageError(Problem("--recipe names no recipe of a preparation", recipe, cure))
    table, how = read_manifest(manifest), construct(composed)
    if not merge:
        numbers = engine.parse_part(part) if part else (1, 1)
        engine.prepare_corpus(table, output, how, part=numbers, num_workers=workers)
    if part:
        following(typed("umbif", "prepare", manifest, "-o", output, "--merge"))
        return
    print(engine.merge(table, output))
    fitting = "umbif_tiny" if how.spacing_mm == 2 else "umbif_vitb"
    following(typed("umbif", "fit", f"pretrain/{fitting}", f"data.corpus={output}"))


@app.command(
    epilog=example(
        "umbif fit pretrain/umbif_vitb data.corpus=corpus",
        "umbif fit finetune/idh data.corpus=corpus model.encoder.weights=runs/umbif_vitb",
        "umbif fit finetune/idh encoder=vits_1mm model.encoder.weights=runs/umbif_vits data.corpus=corpus run.dir=x",
        "umbif fit pretrain/umbif_vitb data.corpus=corpus trainer.max_steps=200000      the same command again goes on",
    )
)
def fit(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Pretrains or fine-tunes. A run that was cut off goes on where it stopped; a finished one is left alone."""
    from umbif.fit import fit as run
    from umbif.recipe.compose import compose

    composed = compose(recipe, overrides or [])
    folder = run(composed)
    if (folder / "predictions.parquet").exists():
        following(typed("umbif", "report", folder))
        return
    following(finetuning(composed.tree, folder))


@app.command(
    epilog=example(
        "umbif report runs/idh runs/mgmt -o report.html",
        "umbif report runs/umbif_vitb                  curves and pictures of a pretraining run, also while it runs",
    )
)
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders with predictions, or one of a pretraining.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Default: in the first run.")] = None,
) -> None:
    """Statistics, comparisons and figures of predictions, as one HTML page; of a pretraining, its curves. No GPU."""
    from umbif.pretrain.run_page import has_page, write_run_page

    only_curves = [run for run in runs if has_page(run)]
    if only_curves and len(runs) > 1:
        cure = "Name such a run alone to see its curves, or leave it out"
        raise UsageError([Problem("The run has curves and no predictions", str(run), cure) for run in only_curves])
    if only_curves:
        page = write_run_page(runs[0], output)
    else:
        from umbif.evaluation.report import write_report

        page = write_report(runs, output or runs[0] / "report.html")
    print(f"Wrote {page}")
    following(typed("python", "-m", "webbrowser", page))


@app.command(epilog=example("umbif phantom -o phantom", "umbif phantom -o phantom_1mm --exams 4 --spacing 1"))
def phantom(
    output: Annotated[Path, typer.Option("-o", "--output", help="An empty folder, or one to go on with.")],
    exams: Annotated[int, typer.Option(help="How many.")] = 20,
    spacing: Annotated[float, typer.Option(help="Millimetres.")] = 2.0,
    seed: Annotated[int, typer.Option(help="Of everything.")] = 0,
    null: Annotated[bool, typer.Option("--null", help="Shuffle the labels: nothing can be learnt.")] = False,
    healthy: Annotated[float, typer.Option(help="Share of the people that have no tumour.")] = 0.0,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes. Default: all cores.")] = None,
) -> None:
    """Writes synthetic glioma exams with known truth, as a hospital would: NIfTI files and a label table."""
    from umbif.corpus.phantom import write_phantom

    labels = write_phantom(
        output, exams, spacing_mm=spacing, seed=seed, null=null, healthy=healthy, num_workers=workers
    )
    prepare = ["--recipe", "prepare/brain_2mm"] if spacing == 2 else []
    following(
        typed("umbif", "index", output, "--labels", labels, "-o", "manifest.parquet"),
        typed("umbif", "prepare", "manifest.parquet", "-o", "corpus", *prepare),
    )


@app.command(epilog=example("umbif demo", "umbif demo --null -o runs/null"))
def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Where everything goes.")] = Path("runs/demo"),
    null: Annotated[bool, typer.Option("--null", help="Shuffle the labels: the report must find nothing.")] = False,
) -> None:
    """The whole way on a laptop: synthetic exams, pretraining, four tasks, a report. Eight minutes on two cores."""
    from umbif.demo import run_demo

    page = run_demo(output, null=null)
    print(f"\nThe report: {page}")
    following(typed("python", "-m", "webbrowser", page), "umbif index YOUR_FOLDER -o manifest.parquet")


@app.command(epilog=example("umbif env"))
def env() -> None:
    """Versions and hardware, to paste into a bug report."""
    import json

    from umbif.machine import environment

    print(json.dumps(environment(), indent=2))


def typed(*words: object) -> str:
    """A command as it has to be typed: a path may hold spaces."""
    return shlex.join(map(str, words))


def finetuning(pretraining: dict[str, Any], folder: Path) -> str:
    """The command that takes the encoder of a pretraining, whichever it is, to a task."""
    from umbif.recipe.compose import compose, encoder_part

    part = encoder_part(pretraining)
    task = "demo/idh" if part is not None and part.endswith("_2mm") else "finetune/idh"
    swapped = [f"encoder={part}"] if part not in (None, encoder_part(compose(task).tree)) else []
    corpus = pretraining["data"]["corpus"]
    return typed("umbif", "fit", task, *swapped, f"data.corpus={corpus}", f"model.encoder.weights={folder}")


def following(*commands: str) -> None:
    """What to type next; said once, also where a run has many processes."""
    from rich.markup import escape

    if is_leader() and not is_child():
        console.print("\n[dim]Next:[/dim]  " + "\n       ".join(map(escape, commands)), markup=True)


def version(wanted: bool) -> None:
    """Prints the version and ends."""
    if wanted:
        print(f"umbif {__version__}")
        raise typer.Exit


@app.callback()
def options(
    _: Annotated[bool, typer.Option("--version", callback=version, is_eager=True, help="The version.")] = False,
) -> None:
    """From folders of brain MRI to a pretrained 3D encoder and its clinical evaluation."""


def unexpected(error: Exception) -> NoReturn:
    """A mistake of ours: a traceback, and for whoever has started this process a code that is none of a refusal."""
    if not is_launched():
        raise error
    traceback.print_exception(error)
    raise SystemExit(UNEXPECTED) from None


def main() -> None:
    """Runs a verb; a person's mistake ends with one message and never with a traceback."""
    try:
        app()
    except (UmbifError, OSError) as error:
        answer = refused(error) if isinstance(error, OSError) else error
        if answer is None:
            unexpected(error)
        if is_first_here() or not isinstance(answer, UsageError | Stopped):  # on which the processes agree
            print(f"umbif: {answer}", file=sys.stderr)
        raise SystemExit(answer.exit_code) from None
    except Exception as error:
        unexpected(error)
    except SystemExit as end:
        if end.code == INTERRUPTED:  # how typer answers Ctrl-C
            print("\numbif: interrupted. The same command starts it again.", file=sys.stderr)
        raise
