"""Curves in Weights & Biases or MLflow, beside metrics.csv: on this machine alone, unless a recipe says otherwise.

What both gather by themselves stays out of it, as it may name people and places: machine and user, paths, code,
commands, what is printed. Where they fail, training goes on without them.
"""

import logging
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import chdir, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import MLFlowLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from umbif.errors import Problem, UsageError, one_line
from umbif.files import write_text
from umbif.scale.loggers import Spared

log = logging.getLogger("umbif")
STEP = "trainer/global_step"  # what Lightning draws curves over
RUN_ID = "run_id.txt"  # of a tracker's folder: a run that goes on is the same one there
BLOCKS = ("model", "data", "trainer")  # of a recipe, whose values are shown
PLACES = ("corpus", "labels", "weights")  # keys whose values are paths
WANDB_PRIVATE: dict[str, Any] = {
    "host": "-", "program": "-", "console": "off", "silent": True, "symlink": False, "save_code": False,
    "disable_code": True, "disable_git": True, "disable_job_creation": True, "x_disable_meta": True,
    "x_disable_stats": True, "x_disable_machine_info": True, "x_save_requirements": False,
}  # fmt: skip
WANDB_FLUSH = "x_transaction_log_flush_interval"  # seconds, which a process that is killed may lose; of newer versions
MLFLOW_PRIVATE = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_ALLOW_FILE_STORE": "true"}
MLFLOW_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}  # training waits for it


class Tracker(Callback):
    """Hands curves to a package that is an extra of UMBIF's.

    Args:
        package: What is imported.
        called: By people.

    Raises:
        UsageError: It is not installed.
    """

    def __init__(self, package: str, called: str) -> None:
        if find_spec(package) is None:
            cure = f"Install it (pip install 'umbif[{package}]'), or set callbacks.{package}=null"
            raise UsageError(Problem(f"callbacks.{package} needs {called}, which is not installed", cure=cure))
        self.package, self.called = package, called
        self.logger: Any = None
        self.shell: dict[str, str] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begins, or goes on with what an earlier start of this run has begun."""
        if stage != "fit" or not trainer.is_global_zero or self.logger is not None:
            return
        self.shell = dict(os.environ)
        try:
            self.logger = self.begin(Path(trainer.default_root_dir).absolute(), shown(trainer.strategy.about))
            trainer.loggers.append(self.logger)
        except Exception as error:
            log.warning("%s cannot begin: %s. Training goes on without it", self.called, one_line(error))
            self._clear(well=False)

    def begin(self, folder: Path, values: Mapping[str, Any]) -> Any:
        """A Lightning logger that has begun, of a run folder and of a recipe's values."""
        raise NotImplementedError

    def end(self, well: bool) -> None:
        """Ends what has begun, as far as it has."""
        raise NotImplementedError

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Ends with the training."""
        self._end(trainer, well=True)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Ends before its time."""
        self._end(trainer, well=False)

    def _end(self, trainer: pl.Trainer, well: bool) -> None:
        if self.logger is not None:
            trainer.loggers.remove(self.logger)
            self._clear(well)

    def _clear(self, well: bool) -> None:
        """Another training in this process finds it as this one has found it."""
        try:
            self.end(well)
        except Exception as error:
            log.warning("%s cannot end: %s", self.called, one_line(error))
        self.logger = None
        prefix = f"{self.package.upper()}_"
        _forget(prefix)
        os.environ |= {name: value for name, value in self.shell.items() if name.startswith(prefix)}


class WandB(Tracker):
    """Weights & Biases, in `wandb/` of the run folder. `wandb sync` brings it to a server.

    Args:
        project: There.
        offline: Nothing leaves this machine; false sends it as training goes on.
    """

    def __init__(self, project: str = "umbif", offline: bool = True) -> None:
        super().__init__("wandb", "Weights & Biases")
        self.project, self.offline = project, offline
        self.own = Path()

    def begin(self, folder: Path, values: Mapping[str, Any]) -> Any:
        """See `Tracker`. Offline, it would take names, notes and servers from variables and from a user's files."""
        self.own, home = folder / "wandb", folder / "wandb" / "home"
        home.mkdir(parents=True, exist_ok=True)
        if self.offline:
            _forget("WANDB_")
            places = {f"WANDB_{name}_DIR": str(home) for name in ("CACHE", "CONFIG", "DATA")}
            os.environ |= {"WANDB_MODE": "offline", **places}
        os.environ |= {"WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true"}
        import wandb

        with chdir(home) if self.offline else nullcontext():  # of the current folder it reads wandb/settings
            wandb.setup()
        flush: dict[str, Any] = {WANDB_FLUSH: 1.0} if WANDB_FLUSH in wandb.Settings.model_fields else {}
        settings = wandb.Settings(**WANDB_PRIVATE, **flush)  # one that is not known is refused, and not left out
        about = {"project": self.project, "offline": self.offline, "settings": settings}
        logger = WandBLogger(name=folder.name, save_dir=folder, id=_run_id(self.own), **about)
        logger._wandb_init.pop("anonymous", None)  # of which newer versions warn
        logger.experiment.config.update(dict(values), allow_val_change=True)
        _stop_debug_log()
        return logger

    def end(self, well: bool) -> None:
        """See `Tracker`."""
        import wandb

        wandb.teardown(exit_code=0 if well else 1)
        for logs in (self.own / "home", *self.own.glob("*run-*/logs")):  # paths, numbers of processes
            shutil.rmtree(logs, ignore_errors=True)


class MLflow(Tracker):
    """MLflow, in `mlflow/` of the run folder.

    Args:
        experiment: There.
        tracking_uri: Of a server, or of a folder that runs share (`file:/data/mlflow`); null for one of its own.
    """

    def __init__(self, experiment: str = "umbif", tracking_uri: str | None = None) -> None:
        super().__init__("mlflow", "MLflow")
        self.experiment, self.tracking_uri = experiment, tracking_uri

    def begin(self, folder: Path, values: Mapping[str, Any]) -> Any:
        """See `Tracker`. A run that is made by a client has no tags of user, code and command."""
        own = folder / "mlflow"
        own.mkdir(exist_ok=True)
        if self.tracking_uri is None:
            _forget("MLFLOW_")
        os.environ |= {**MLFLOW_PATIENCE, **os.environ, **MLFLOW_PRIVATE}  # before it is imported
        import mlflow

        uri = self.tracking_uri or f"file:{own}"
        client, path = mlflow.MlflowClient(uri), own / RUN_ID
        if path.exists():
            run_id = path.read_text()
            client.update_run(run_id, status="RUNNING")
        else:
            found = client.get_experiment_by_name(self.experiment)
            place = found.experiment_id if found else client.create_experiment(self.experiment, "mlflow-artifacts:/")
            run_id = client.create_run(place, run_name=folder.name).info.run_id
            write_text(path, run_id)
            for key, value in values.items():
                client.log_param(run_id, key, value)
        return MLflowLogger(tracking_uri=uri, run_id=run_id)

    def end(self, well: bool) -> None:
        """See `Tracker`."""
        if self.logger is not None:
            self.logger.finalize("success" if well else "failed")


class WandBLogger(Spared, WandbLogger):
    """Lightning's, with steps that are those of training in a run that goes on, too."""

    called, failures = "Weights & Biases", (Exception,)

    @rank_zero_only
    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Paths may be among them."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Of one step."""
        self.spare(self.experiment.log, {**metrics, STEP: step}, step)


class MLflowLogger(Spared, MLFlowLogger):
    """Lightning's."""

    called, failures = "MLflow", (Exception,)

    @rank_zero_only
    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Paths may be among them."""


def shown(about: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a recipe that are no paths, by dotted keys."""
    recipe = about.get("recipe", {})
    pairs = (pair for block in BLOCKS for pair in _leaves(recipe.get(block, {}), block))
    return {key: value for key, value in pairs if key.rpartition(".")[2] not in PLACES and os.sep not in str(value)}


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}")
    else:
        yield key, value


def _run_id(folder: Path) -> str:
    path = folder / RUN_ID
    if not path.exists():
        write_text(path, secrets.token_hex(4))
    return path.read_text()


def _forget(prefix: str) -> None:
    for name in [name for name in os.environ if name.lstrip("_").startswith(prefix)]:
        del os.environ[name]


def _stop_debug_log() -> None:
    """Of W&B, which holds paths."""
    own = logging.getLogger("wandb")
    for handler in [found for found in own.handlers if isinstance(found, logging.FileHandler)]:
        own.removeHandler(handler)
        handler.close()
        Path(handler.baseFilename).unlink(missing_ok=True)
