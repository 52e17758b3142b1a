"""Errors for people: what is wrong, what was found, how to cure it; all of them at once, and never a traceback."""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

UNEXPECTED = 70  # exit code EX_SOFTWARE of a process that ends with a traceback, and that something has started
MOST_LETTERS = 200  # of what another library says


@dataclass(frozen=True)
class Problem:
    """One thing that a person can put right."""

    what: str
    got: str = ""
    cure: str = ""

    def __str__(self) -> str:
        line = self.what if not self.got else f"{self.what}: got {self.got}"
        return line if not self.cure else f"{line}. {self.cure}"


class UmbifError(Exception):
    """The work could not be done. The command line prints the message and ends with exit code 1."""

    exit_code = 1

    def __str__(self) -> str:
        # A DataLoader hands on an error of its worker as one text, whose traceback ends with what was said.
        return super().__str__().rpartition(f"{type(self).__module__}.{type(self).__qualname__}: ")[2].strip()


class Transient(UmbifError):
    """A process, a connection or a memory cell has failed, and not the work: the same command may go on."""

    exit_code = 75  # EX_TEMPFAIL


class Stopped(UmbifError):
    """Somebody ended the work: a person by Ctrl-C, or a system by a signal.

    Args:
        message: For people.
        signal: Its number.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal  # as a shell has it: 0 would pass for finished work


class UsageError(UmbifError):
    """What was asked for cannot be meant so. Ends with exit code 2.

    Args:
        problems: All of the problems found, not only the first; or their text, as errors come out of other processes.
        where: What they were found in (a recipe, a table, a folder).
    """

    exit_code = 2

    def __init__(self, problems: Problem | Sequence[Problem] | str, where: str = "") -> None:
        problems = Problem(problems) if isinstance(problems, str) else problems
        self.problems = [problems] if isinstance(problems, Problem) else list(problems)
        super().__init__(self._text(where))

    def _text(self, where: str) -> str:
        if len(self.problems) == 1 and not where:
            return str(self.problems[0])
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        return "\n".join([f"{count} in {where}:" if where else f"{count}:", *(f"  {p}" for p in self.problems)])


def one_line(error: BaseException) -> str:
    """What an exception of another library says, in one line that a message can hold."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is not None and problem:  # YAML's
        return f"{problem} in line {mark.line + 1}"
    if type(error) is KeyError:
        return f"no {error.args[0]}"
    line = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return line if len(line) <= MOST_LETTERS else f"{line[:MOST_LETTERS]} …"


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint such as `Did you mean mask_ratio?`, or the valid names where none is near."""
    names = [str(v) for v in valid]
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"Did you mean {close[0]}?"
    return f"Valid: {', '.join(sorted(names))}." if names else ""
