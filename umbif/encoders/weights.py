"""Encoders on disk: `model.safetensors`, and a `config.json` that says what they are and how exams were prepared.

Files of other programs are read here too, and only as data; `layouts` knows their names.
"""

import argparse
import json
import pickle
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from umbif.encoders.layouts import LoadReport, load_foreign
from umbif.errors import Problem, UmbifError, UsageError, one_line
from umbif.files import read_mapping, reading, whole, write_text
from umbif.machine import is_leader
from umbif.progress import console

WEIGHTS, CONFIG, SEEN = "model.safetensors", "config.json", "seen.txt"
SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".safetensors")
ENCODER_CURE = "Copy the encoder again; or delete its folder, and the umbif fit command that made it writes it anew"
WRAPPERS = ("model", "state_dict", "model_state_dict", "module")  # where checkpoints keep the tensors
CONVERT = """
python -c '
import sys, torch; from safetensors.torch import save_file
d = torch.load(sys.argv[1], map_location="cpu", weights_only=False); d = d.get("state_dict", d.get("model", d))
save_file({k: v.clone().contiguous() for k, v in d.items() if torch.is_tensor(v)}, sys.argv[2])
' FILE NEW.safetensors"""


class Encoder(Protocol):
    """What saving needs of an encoder: its arguments, and its tensors."""

    config: dict[str, Any]

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor by name."""

    def load_state_dict(self, state_dict: dict[str, Tensor], strict: bool) -> Any:
        """Takes every tensor by name."""


def save_encoder(encoder: Encoder, folder: Path, about: dict[str, Any], seen: Iterable[str] = ()) -> None:
    """Writes an encoder folder.

    Args:
        encoder: To be saved.
        folder: Made if need be.
        about: Goes into its config: preparation, run, versions.
        seen: Marks of the images that it has learnt from; those of the encoder that it started from are added. Where
            that one did not say its own, the list would pass for whole, and none is written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in encoder.state_dict().items()}
    class_path = f"{type(encoder).__module__}.{type(encoder).__qualname__}"
    config = {"class_path": class_path, "init_args": encoder.config, **about}
    if loaded := getattr(encoder, "loaded", None):
        config["started_from"] = {**loaded, "source": _name_of(Path(loaded["source"]))}
    write_tensors(tensors, folder / WEIGHTS)
    if own_source(encoder) is None or encoder.seen is not None:  # type: ignore[attr-defined]
        write_text(folder / SEEN, "".join(f"{mark}\n" for mark in sorted({*seen, *seen_by(encoder)})))
    write_text(folder / CONFIG, json.dumps(config, indent=2))  # last: it says that the run has finished


def _name_of(source: Path) -> str:
    """Of a run, not of the `encoder/` in it; and not the whole path, which may name people."""
    return source.parent.name if source.name == "encoder" else source.name


def own_source(encoder: Any) -> Path | None:
    """The encoder folder of ours that an encoder started from, if it did from one."""
    loaded = getattr(encoder, "loaded", None) or {}
    return Path(loaded["source"]) if loaded.get("layout") == "umbif" else None


def seen_by(encoder: Any) -> frozenset[str]:
    """Marks of the images that an encoder has learnt from, as far as its weights came with them."""
    return getattr(encoder, "seen", None) or frozenset()


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Writes a file of tensors, whole or not at all.

    Raises:
        UmbifError: The system did not let it.
    """
    try:
        with whole(path) as aside:
            save_file(tensors, aside)
    except SafetensorError as error:  # which hides the system's
        raise UmbifError(f"{path} could not be written: {one_line(error)}") from error


def encoder_folder(path: str | Path) -> Path:
    """The encoder folder of a run, or the path itself if it is one.

    Raises:
        UsageError: There is none.
    """
    folder = Path(path)
    for candidate in (folder, folder / "encoder"):
        if (candidate / WEIGHTS).is_file() and (candidate / CONFIG).is_file():
            return candidate
    raise UsageError(
        Problem(
            "model.encoder.weights names no encoder",
            str(path),
            f"Give a finished run (runs/NAME), a folder with {WEIGHTS}, {CONFIG} and {SEEN}, or a file of weights",
        )
    )


def read_config(path: str | Path) -> dict[str, Any]:
    """The config of an encoder folder or run."""
    return read_mapping(encoder_folder(path) / CONFIG, ENCODER_CURE)


def load_encoder_weights(encoder: Encoder, path: str | Path) -> LoadReport:
    """Loads weights, every tensor or none: of a run or folder of ours with the same config, or of a public file.

    What was loaded is kept as `encoder.loaded`, and the marks of what it has learnt from as `encoder.seen`,
    which is None where nothing says so.

    Raises:
        UsageError: They do not fit (each difference is named), or the file is damaged.
    """
    file = _foreign_file(Path(path))
    if file is None:
        report = _load_ours(encoder, encoder_folder(path))
    else:
        report = load_foreign(encoder, read_tensors(file), file)
        if is_leader():
            console.print(str(report), markup=False)
    setattr(encoder, "loaded", report.as_dict())  # noqa: B010 - an encoder need not declare it
    setattr(encoder, "seen", _seen(encoder_folder(path)) if file is None else None)  # noqa: B010
    return report


def _foreign_file(path: Path) -> Path | None:
    """The file of another program that is meant; in a folder of Hugging Face's, it has the name that ours has."""
    if path.is_file() or (path.suffix in SUFFIXES and not path.is_dir()):
        return path
    theirs = (path / WEIGHTS).is_file() and (path / CONFIG).is_file() and "init_args" not in read_config(path)
    return path / WEIGHTS if theirs else None


def _load_ours(encoder: Encoder, folder: Path) -> LoadReport:
    with reading(folder / CONFIG, ENCODER_CURE):
        theirs, ours = dict(read_config(folder)["init_args"]), encoder.config
    differing = [
        Problem(f"model.encoder.{key}={ours.get(key)}, but the weights have {theirs.get(key)}")
        for key in sorted({*theirs, *ours})
        if theirs.get(key) != ours.get(key)
    ]
    if differing:
        raise UsageError(differing, f"the weights of {folder}")
    try:
        tensors = load_file(folder / WEIGHTS)
        encoder.load_state_dict(tensors, strict=True)
    except SafetensorError as error:
        raise UsageError(Problem(f"{folder / WEIGHTS} is damaged", str(error), "Copy or export it again")) from error
    return LoadReport(str(folder), "umbif", sorted(tensors))


def _seen(folder: Path) -> frozenset[str] | None:
    """None where the file was not copied with the weights."""
    with reading(folder / SEEN, ENCODER_CURE):
        return frozenset((folder / SEEN).read_text().split()) if (folder / SEEN).exists() else None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, without a wrapper; nothing in the file is ever run.

    Raises:
        UsageError: There is no such file, it is damaged, or only code could read it.
    """
    if not path.is_file():
        raise UsageError(Problem("model.encoder.weights names no file", str(path), "Give a run, a folder or a file"))
    if path.suffix not in SUFFIXES:
        raise UsageError(Problem(f"{path} is of no known kind", path.suffix, f"Known: {', '.join(SUFFIXES)}"))
    try:
        content = load_file(path) if path.suffix == ".safetensors" else _unpickled(path)
    except SafetensorError as error:
        raise UsageError(Problem(f"{path} is damaged", str(error), "Fetch it again")) from error
    outer = content if isinstance(content, dict) else {}
    for inner in [*(outer.get(key) for key in WRAPPERS), outer]:
        items = inner.items() if isinstance(inner, dict) else ()
        if tensors := {str(name): tensor for name, tensor in items if isinstance(tensor, Tensor)}:
            return tensors
    got = ", ".join(map(str, outer)) or type(content).__name__
    cure = f"They must stand at the top or under one of {', '.join(WRAPPERS)}"
    raise UsageError(Problem(f"{path} holds no tensors by name", got, cure))


def _unpickled(path: Path) -> Any:
    """A file of torch.save; a Namespace, which MAE's checkpoints hold, is plain data."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError as error:
        raise UsageError(Problem(f"{path} cannot be read", str(error))) from error
    except Exception as error:  # a broken pickle raises nearly anything
        raise UsageError(_unreadable(path, error)) from error


def _unreadable(path: Path, error: Exception) -> Problem:
    wanted = re.search(r"GLOBAL (\S+)", str(error))
    if "TorchScript" not in str(error) and not (isinstance(error, pickle.UnpicklingError) and wanted):
        return Problem(f"{path} is damaged or was not written by torch.save", one_line(error), "Fetch it again")
    cure = f"Code could do anything, so it is not run. If you trust who made the file, convert it once:{CONVERT}"
    return Problem(f"{path} cannot be read without running code", wanted[1] if wanted else "TorchScript", cure)
