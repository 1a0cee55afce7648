"""A training on disk: everything it needs to go on as if nothing had happened, in one file that is always whole."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any, Final

import torch

from tumbaga.online.errors import TrainingError
from tumbaga.online.versions import write_whole

FILE: Final = "checkpoint.pt"
LOG: Final = "log.jsonl"


def save(folder: Path, state: dict[str, Any]) -> None:
    """Write a state of tensors, numbers and texts; a kill at any instant leaves this one or the one before."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_whole(folder / FILE, buffer.getvalue())


def load(folder: Path, fingerprint: str) -> dict[str, Any] | None:
    """Read the state of a training; None where there is none. Nothing in the file is executed.

    Args:
        folder: of the training.
        fingerprint: of data, settings and start; the state must be of the same.

    Raises:
        TrainingError: the file is damaged, or of another training.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True)
        found = state["fingerprint"]
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, TypeError, pickle.UnpicklingError) as error:
        told = (str(error).splitlines() or [type(error).__name__])[0]
        raise TrainingError(str(path), f"cannot be read ({told:.120}); remove it to start again") from error
    if found != fingerprint:
        raise TrainingError(str(path), "is of a training with other data, settings or start; go on with those, or take another folder")
    return state


def add_line(folder: Path, line: dict[str, Any]) -> None:
    """Append to the log, one JSON object a line."""
    with open(folder / LOG, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def lines(folder: Path) -> list[dict[str, Any]]:
    """Read the log; a last line that a kill cut off is left out."""
    path = folder / LOG
    found = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            found.append(json.loads(text))
        except ValueError:
            break
    return found


def keep_lines(folder: Path, epoch: int) -> None:
    """Take out of the log what comes again: epochs from this one on."""
    kept = "".join(json.dumps(line) + "\n" for line in lines(folder) if line["epoch"] < epoch)
    write_whole(folder / LOG, kept.encode())
