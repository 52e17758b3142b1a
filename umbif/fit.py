"""What `umbif fit` does: build, resume, train, export."""

import logging
import signal
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint, LambdaCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from umbif.agreement import doubts, refuse_disagreement
from umbif.downstream.finetune import rename_predictions
from umbif.encoders.vit import ViT3D
from umbif.encoders.weights import CONFIG, ENCODER_CURE
from umbif.errors import Problem, Stopped, UmbifError, UsageError, one_line
from umbif.files import read_mapping, reading
from umbif.hardware import Asked, cluster_plugins, devices_of, hardware_problems, launcher_problems, num_to_start
from umbif.machine import environment, is_leader
from umbif.pretrain.run_page import has_page, write_run_page
from umbif.progress import console
from umbif.quiet import quiet
from umbif.recipe.build import Built, build, construct
from umbif.recipe.check import Run, check
from umbif.recipe.compose import Recipe
from umbif.run import open_run, write_provenance
from umbif.scale.checkpoint_folder import checkpoints, remove_leftovers
from umbif.scale.choice import strategy_of
from umbif.scale.goodput import Goodput
from umbif.scale.launch import end_with_launcher, launch
from umbif.scale.loggers import TensorBoard
from umbif.scale.metrics_csv import MetricsCSV
from umbif.scale.preemption import Preemption
from umbif.scale.ranks import lost
from umbif.scale.stragglers import Stragglers
from umbif.scale.strategies import DDP, Single
from umbif.scale.throughput import Throughput
from umbif.scale.training_progress import TrainingProgress
from umbif.stream.modules import SlotCounter, killed

log = logging.getLogger("umbif")


def fit(recipe: Recipe) -> Path:
    """Trains what a recipe describes, or goes on with it; a finished run is left as it is.

    Returns:
        The run folder.

    Raises:
        UsageError: The recipe is wrong, asks for hardware that is not there, or the folder holds a run of another one.
    """
    quiet()
    refuse_wrong(recipe)
    max_steps, run = recipe.tree["trainer"]["max_steps"], Run(**recipe.tree["run"])
    num_processes = num_to_start(recipe.tree["trainer"])
    if num_processes > 1:
        launch(["fit", *recipe.typed], num_processes, Path(run.dir), run.restarts)
        return Path(run.dir)
    end_with_launcher()
    with open_run(Path(run.dir), recipe) as folder:
        if finished_steps(folder) >= max_steps:
            refuse_other_people(recipe, folder)
            _rename(folder, recipe)
            console.print(f"{folder} has finished its {max_steps} steps: nothing to do.")
            return folder
        _train(recipe, folder)
    return folder


def refuse_wrong(recipe: Recipe) -> None:
    """Refuses a recipe that cannot be trained.

    Raises:
        UsageError: It is no recipe of a training, or its values are wrong; all of them are named.
    """
    if "model" not in recipe.tree:
        raise UsageError(Problem(f"{recipe.name} trains nothing", cure="Recipes that do:  umbif ls pretrain"))
    problems = [*length_problems(recipe), *check(recipe)]
    if problems:
        raise UsageError(problems, recipe.name)


def length_problems(recipe: Recipe) -> Iterator[Problem]:
    """A training must say how long it takes: Lightning would go on for ever."""
    trainer = recipe.tree.get("trainer")
    steps = trainer.get("max_steps") if isinstance(trainer, dict) else None
    if steps is None or (isinstance(steps, int) and steps < 0):
        got = "nothing" if steps is None else str(steps)
        yield Problem("trainer.max_steps must be a number of steps, 0 or more", got)


def finished_steps(folder: Path) -> int:
    """The steps after which a run's encoder was exported; -1 for a run that has not ended."""
    config = folder / "encoder" / CONFIG
    with reading(config, ENCODER_CURE):
        return int(read_mapping(config, ENCODER_CURE).get("steps", 0)) if config.exists() else -1


def refuse_other_people(recipe: Recipe, folder: Path) -> None:
    """A finished run answers for what it has learnt from: corrected labels or another corpus ask for another run.

    Raises:
        UsageError: Corpus, persons, split or labels are others now.
    """
    about = read_mapping(folder / "encoder" / CONFIG, ENCODER_CURE)
    places = [recipe.tree["data"].get(name) for name in ("corpus", "labels")]
    if not all(Path(place).exists() for place in places if place):  # staged for a job that has ended
        return
    data = construct(replace(recipe, tree={**recipe.tree["data"], "run": recipe.tree["run"]}))
    if any(about.get(name, now) != now for name, now in (("corpus", data.corpus.identity), ("people", data.people()))):
        what = f"{folder} has finished with other exams, persons, labels or another split"
        raise UsageError(Problem(what, cure="Choose another run.dir, or delete that folder"))


def _rename(folder: Path, recipe: Recipe) -> None:
    """A name is for tables: it may be given when the run has finished."""
    name = recipe.tree["model"].get("model_name")
    if name and is_leader() and rename_predictions(folder, name):
        write_provenance(folder, recipe)
        console.print(f"Tables call its model {name} now.")


def _train(recipe: Recipe, folder: Path) -> None:
    if is_leader():
        remove_leftovers(folder / "checkpoints")
    resume = folder / "checkpoints" if checkpoints(folder / "checkpoints") else None
    if resume is None and finished_steps(folder) > 0:
        raise UmbifError(f"{folder} has finished, and has no checkpoint to go on from. Give another run.dir.")
    pl.seed_everything(recipe.tree["run"]["seed"], verbose=False)
    built = build(recipe)
    refuse_disagreement(built)
    for doubt in doubts(built) if is_leader() else ():
        log.warning(doubt)
    # Only once the checkpoint has been found to belong to this corpus: what is refused must not claim the folder.
    provenance = LambdaCallback(on_train_start=lambda trainer, _: _started(trainer, recipe, folder))
    about = {"recipe": recipe.tree, "corpus": built.data.corpus.identity, **environment()}
    preemption = Preemption()
    trainer = make_trainer(built.trainer_args, [preemption, provenance, *built.callbacks.values()], folder, about)
    trainer.strategy.resumes = resume is not None
    with _in_plain_words(trainer, built):
        if trainer.max_steps:  # a comparator that takes no step needs no exam
            trainer.fit(built.model, datamodule=built.data, ckpt_path=resume)
            preemption.leave_if_asked()
            refuse_untaught(built, trainer.global_step, folder)
        else:
            write_provenance(folder, recipe)
        export(built, recipe, trainer, folder)
    if is_leader() and has_page(folder):
        write_run_page(folder)
    log.info("finished at step %s", trainer.global_step)


def export(built: Built, recipe: Recipe, trainer: pl.Trainer, folder: Path) -> None:
    """Writes what a run is for; where weights lay in parts, from a copy that has all of them in each process."""
    model, num_steps = built.model, trainer.global_step
    if not isinstance(trainer.strategy, Single | DDP):
        if num_steps:
            model = build(recipe).model
            model.load_state_dict(trainer.strategy.whole_state())
        trainer = make_trainer({**built.trainer_args, "strategy": "auto"}, [Preemption()], folder, {})
    model.export(folder, built.data, trainer, num_steps)


def _started(trainer: pl.Trainer, recipe: Recipe, folder: Path) -> None:
    write_provenance(folder, recipe)
    step = trainer.global_step
    next(logger for logger in trainer.loggers if isinstance(logger, MetricsCSV)).go_on_from(step)
    if step and trainer.is_global_zero:
        console.print(f"Going on from step {step} of {folder}")
    log.info("training starts at step %s", step)


@contextmanager
def _in_plain_words(trainer: pl.Trainer, built: Built) -> Iterator[None]:
    """What ends a training before its time."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UmbifError(f"The GPU's memory ran out. {_less_memory(built)}") from error
    except SystemExit as end:  # Lightning's answer to Ctrl-C and to SIGTERM
        pressed = isinstance(end.__context__, KeyboardInterrupt)
        if not pressed and not isinstance(end, SIGTERMException):
            raise
        by = signal.SIGINT if pressed else signal.SIGTERM
        ended = f"Ended by {by.name} at step {trainer.global_step}"
        raise Stopped(f"{ended}. The same command goes on from the last checkpoint.", by) from None
    except RuntimeError as error:
        answer = killed(error) or lost(error)
        if answer is None:
            raise
        raise answer from error


def _less_memory(built: Built) -> str:
    cures = ["Lower data.global_batch_size and raise trainer.accumulate_grad_batches by the same factor"]
    cures += ["lower model.max_tokens"] if hasattr(built.model, "max_tokens") else []
    cures += ["set model.encoder.activation_checkpointing=true"] if isinstance(built.model.encoder, ViT3D) else []
    said = f"{', or '.join(cures)}. Once a checkpoint was written, another batch or max_tokens needs another run.dir."
    whole = " Validation and prediction see one whole brain: if that is too much, name fewer data.sequences."
    return said + whole * hasattr(built.model, "max_tokens")


def refuse_untaught(built: Built, num_steps: int, folder: Path) -> None:
    """An encoder that no step has changed would be exported as a trained one.

    Raises:
        UmbifError: Every step was skipped.
    """
    guard = getattr(built.model, "guard", None)
    if guard is not None and 0 < num_steps <= len(guard.skipped):
        raise UmbifError(f"All {num_steps} steps were skipped; {folder / 'log.txt'} says why. Nothing was exported.")


def make_trainer(
    options: dict[str, Any], callbacks: list[Any], folder: Path, about: Mapping[str, Any]
) -> pl.Trainer:
    """Lightning's Trainer as UMBIF needs it, and as the recipe says in everything else.

    Args:
        options: Keys of the recipe.
        callbacks: Beside those of every training.
        folder: Of the run.
        about: What checkpoints say of themselves.

    Raises:
        UsageError: The recipe asks for hardware that is not there or for other processes than were started, or holds
            a value that Lightning does not take.
    """
    asked = Asked.of(options)
    if problems := [*hardware_problems(asked), *launcher_problems(asked)]:
        raise UsageError(problems)
    always = [SlotCounter(), Throughput(), Goodput(), Stragglers(), TrainingProgress()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about loggers that the run folder makes unnecessary
        loggers = [MetricsCSV(folder), TensorBoard(str(folder), "tensorboard", "")]
    try:
        strategy = strategy_of(options, devices_of(options))
        strategy.about = about
        return pl.Trainer(
            **{
                "max_epochs": -1,  # the stream is endless: steps are what ends it
                "enable_model_summary": False,
                "enable_progress_bar": False,  # ours knows the steps
                "num_sanity_val_steps": 0,
                "check_val_every_n_epoch": None,
                **options,
                "strategy": strategy,
            },
            use_distributed_sampler=False,  # Lightning's own shuffles even where it was told not to
            enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),  # else it adds one
            default_root_dir=str(folder),
            logger=loggers,
            plugins=cluster_plugins(),
            callbacks=[*always, *callbacks],
        )
    except (MisconfigurationException, ImportError, RuntimeError, TypeError, ValueError) as error:
        raise UsageError(trainer_problem(error)) from error


def trainer_problem(error: Exception) -> Problem:
    """What Lightning would not build."""
    if isinstance(error, ImportError):
        return Problem("trainer needs a package that is not installed", one_line(error))
    return Problem("trainer holds a value that Lightning does not take", one_line(error))
