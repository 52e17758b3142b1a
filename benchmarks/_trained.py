"""Small trainings that can be cut off anywhere: forked from a warm process, or started as users do."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _kills import forked

from umbif.recipe.compose import Recipe

HERE = Path(__file__).resolve().parent
TESTS = HERE.parent / "tests"
sys.path.insert(0, str(TESTS))  # recipes at the size of tests


class Job(NamedTuple):
    """A small training.

    Args:
        recipe: Its name.
        overrides: Of the command line.
        labels: A table, for fine-tuning.
    """

    recipe: str
    overrides: tuple[str, ...] = ()
    labels: Path | None = None

    def composed(self, corpus: Path, run_dir: Path, *more: str) -> Recipe:
        """As `tests/small.py` makes recipes small."""
        from small import small_fit

        return small_fit(self.recipe, corpus, run_dir, self.labels, *self.overrides, *more)


def trained(job: Job, corpus: Path, run_dir: Path, num_processes: int, *more: str) -> list[int]:
    """Forks the processes of a training, and waits for them; exit codes, of a signal negative.

    What the others of one that has fallen do is to wait: they are killed as soon as one has ended badly.
    """
    recipe = job.composed(corpus, run_dir, *more, f"trainer.devices={num_processes}")
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    port = free_port()
    children = [forked(lambda rank=rank: _fit(recipe, rank, num_processes, port)) for rank in range(num_processes)]
    codes: dict[int, int] = {}
    while len(codes) < num_processes:
        for child in set(children) - set(codes):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                codes[child] = os.waitstatus_to_exitcode(status)
        if any(codes.values()):
            for child in set(children) - set(codes):
                os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[child] for child in children]


def _fit(recipe: Recipe, rank: int, num_processes: int, port: int) -> None:
    from umbif.fit import fit

    torch.set_num_threads(1)
    if num_processes > 1:
        os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    said = os.open(Path(recipe.tree["run"]["dir"]).with_suffix(f".{rank}.txt"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    fit(recipe)


def commanded(
    job: Job, corpus: Path, run_dir: Path, *more: str, limit_s: float = 300, within: Sequence[str] = ()
) -> tuple[int, str]:
    """`umbif fit` as a user types it, `within` another command; its exit code, and what it said."""
    started = command(job.composed(corpus, run_dir, *more), within)
    joined: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(**started, **joined, start_new_session=True) as process:
        try:
            said, _ = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:  # what is looked for is this, too
            os.killpg(process.pid, signal.SIGKILL)
            said, _ = process.communicate()
    return process.returncode, said


def command(recipe: Recipe, within: Sequence[str] = ()) -> dict[str, Any]:
    """What a subprocess needs to train a recipe, which is written beside its run folder."""
    run_dir = Path(recipe.tree["run"]["dir"])
    file = run_dir.parent / f"{run_dir.name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(recipe.to_yaml())
    path = os.pathsep.join([str(HERE), str(TESTS), *sys.path])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return {"args": [*within, sys.executable, "-m", "umbif", "fit", str(file)], "env": environment}


def free_port() -> int:
    """Of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def weights(run_dir: Path) -> bytes:
    """Of the encoder that a run has exported."""
    return (run_dir / "encoder" / "model.safetensors").read_bytes()


def has_ended(run_dir: Path) -> bool:
    """Whether a run has exported its encoder."""
    return (run_dir / "encoder" / "model.safetensors").is_file()


def losses(run_dir: Path) -> list[float]:
    """Of all micro-steps, of a run that was never killed."""
    found: list[float] = json.loads((run_dir / "losses.json").read_text())
    return found


def apart(values: Sequence[float], others: Sequence[float]) -> float:
    """Largest relative difference."""
    return max(abs(a - b) / abs(b) for a, b in zip(values, others, strict=True))
