"""Encoders on disk: `model.safetensors`, and a `config.json` that says what they are and how exams were prepared."""

import json
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from umbif.errors import Problem, UsageError

WEIGHTS, CONFIG = "model.safetensors", "config.json"


class Encoder(Protocol):
    """What saving needs of an encoder: its arguments, and its tensors."""

    config: dict[str, Any]

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor by name."""

    def load_state_dict(self, state_dict: dict[str, Tensor], strict: bool) -> Any:
        """Takes every tensor by name."""


def save_encoder(encoder: Encoder, folder: Path, about: dict[str, Any]) -> None:
    """Writes an encoder folder; `about` (preparation, run, versions) goes into its config."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in encoder.state_dict().items()}
    aside = folder / f".{WEIGHTS}.writing"
    save_file(tensors, aside)
    class_path = f"{type(encoder).__module__}.{type(encoder).__qualname__}"
    config = {"class_path": class_path, "init_args": encoder.config, **about}
    (folder / CONFIG).write_text(json.dumps(config, indent=2))
    aside.replace(folder / WEIGHTS)


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
            "Give a finished run (runs/NAME) or a folder with model.safetensors and config.json",
        )
    )


def read_config(path: str | Path) -> dict[str, Any]:
    """The config of an encoder folder or run."""
    config: dict[str, Any] = json.loads((encoder_folder(path) / CONFIG).read_text())
    return config


def load_encoder_weights(encoder: Encoder, path: str | Path) -> None:
    """Loads weights into an encoder of the same configuration, every tensor or none.

    Raises:
        UsageError: The configurations differ (each difference is named), or the file is damaged.
    """
    folder = encoder_folder(path)
    theirs, ours = read_config(folder)["init_args"], encoder.config
    differing = [
        Problem(f"model.encoder.{key}={ours.get(key)}, but the weights have {theirs.get(key)}")
        for key in sorted({*theirs, *ours})
        if theirs.get(key) != ours.get(key)
    ]
    if differing:
        raise UsageError(differing, f"the weights of {folder}")
    try:
        encoder.load_state_dict(load_file(folder / WEIGHTS), strict=True)
    except SafetensorError as error:
        raise UsageError(Problem(f"{folder / WEIGHTS} is damaged", str(error), "Copy or export it again")) from error
