"""The processes of a run on one machine: started together, watched, and started again when one of them falls.

The watching is torch's elastic agent, which ends the others when one ends. What it lacks stands here: not to start
again what would fail again (a wrong recipe), and to give up only where a run makes no progress.
"""

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from umbif.errors import UNEXPECTED, Transient
from umbif.machine import OWN_RUN, end_with_parent, is_child, num_cores
from umbif.progress import console
from umbif.scale.checkpoint_folder import checkpoints, step_of

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

REFUSED = (1, 2)  # it has said why it cannot go on
ASKED = (128 + signal.SIGINT, 128 + signal.SIGTERM)  # it was told to end
# Of failures in the same second, those of higher rank are likelier to have followed from another; all others have 0.
FOLLOWS = {UNEXPECTED: 1, -signal.SIGKILL: 2, Transient.exit_code: 3, ASKED[1]: 4, -signal.SIGTERM: 4}
SAID = {Transient.exit_code: "gave up, as it says above", UNEXPECTED: "ended with an error, as shown above"}
EXPLAINED = {signal.SIGKILL: ", as the system does when memory runs out"}
GRACE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "300"  # s, for two steps and a save; since torch 2.12
LAUNCHER = "UMBIF_LAUNCHER"  # variable: its number


def launch(arguments: Sequence[str], num_processes: int, folder: Path, restarts: int) -> None:
    """Runs `umbif ARGUMENTS` in so many processes until it has finished.

    Args:
        arguments: Of the command line.
        num_processes: On this machine.
        folder: Of the run: its checkpoints say whether it makes progress.
        restarts: How often to start again without a new checkpoint.

    Raises:
        SystemExit: The processes have said why they end.
        Transient: Processes fell too often.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException

    os.environ.setdefault(*GRACE)
    try:
        _run(arguments, num_processes, folder, restarts)
    except SignalException as ended:
        raise SystemExit(128 + ended.sigval) from None


def end_with_launcher() -> None:
    """A process that `launch` has started must not go on when that is killed: it would hold GPUs and the run folder.

    At once, as a process that waits for another answers no gentler signal; its checkpoints are complete or absent.
    """
    if is_child():
        end_with_parent()
        if str(os.getppid()) != os.environ.get(LAUNCHER):  # it has gone already
            raise Transient("The process that has started this one has ended.")


def _run(arguments: Sequence[str], num_processes: int, folder: Path, restarts: int) -> None:
    left, reached = restarts, _newest_step(folder)
    while failed := _run_once(arguments, num_processes):
        if (code := _answer(failed)) is not None:
            raise SystemExit(code)
        said, step = _ended(failed), _newest_step(folder)
        left = restarts if step > reached else left - 1
        reached = max(step, reached)
        if left < 0:
            said += f", as {restarts} times before without a new checkpoint" if restarts else ""
            raise Transient(f"{said}. The same command goes on from the last checkpoint; see {folder / 'log.txt'}.")
        where = f"from step {step}" if step >= 0 else "from the beginning"
        console.print(f"{said}. All processes start again {where}.")


def _run_once(arguments: Sequence[str], num_processes: int) -> list["ProcessFailure"]:
    """Processes that failed; none where all have finished."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in ("", ".agent.server.api"):  # what they say is said here in words
        logging.getLogger(f"torch.distributed.elastic{name}").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=num_processes, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        local_addr="127.0.0.1", run_id=OWN_RUN + uuid.uuid4().hex, max_restarts=0, monitor_interval=0.2,
    )  # fmt: skip
    os.environ[LAUNCHER] = str(os.getpid())
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // num_processes)))
    try:
        elastic_launch(config, sys.executable)("-u", "-m", "umbif", *arguments)
    except ChildFailedError as error:
        return list(error.failures.values())
    return []


def _answer(failed: Sequence["ProcessFailure"]) -> int | None:
    """The exit code of processes that have said why they end, or were told to; None where they are to start again.

    Of a refusal, the others are ended by the agent, or lose the one that has refused.
    """
    codes = {one.exitcode for one in failed}
    if codes & {*REFUSED} and codes <= {*REFUSED, *ASKED, *FOLLOWS}:
        return max(codes & {*REFUSED})
    return max(codes & {*ASKED}) if codes & {*ASKED} and codes <= {*ASKED, *FOLLOWS} - {UNEXPECTED} else None


def _ended(failed: Sequence["ProcessFailure"]) -> str:
    """In words: the first failure; of those in the same second, the likeliest cause."""
    first = min(failed, key=lambda one: (one.timestamp, FOLLOWS.get(one.exitcode, 0), one.local_rank))
    who, code = f"Process {first.local_rank}", first.exitcode
    if code >= 0:
        return f"{who} {SAID.get(code, f'ended with exit code {code}')}"
    number = signal.Signals(-code)
    return f"{who} was ended by {number.name}{EXPLAINED.get(number, '')}"


def _newest_step(folder: Path) -> int:
    found = checkpoints(folder / "checkpoints")
    return step_of(found[0]) if found else -1
