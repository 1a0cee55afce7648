"""chemiscope's files, for chemiscope.org and notebooks: every frame with its energy, forces, uncertainty and error."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tumbaga.driver.exporting import Exported, missing
from tumbaga.driver.exporting_ase import atoms_of


def write(rows: Sequence[Exported], path: Path, /, *, prefix: str, title: str) -> None:
    """Write a chemiscope file. Quantities that are known of no frame are left out; where one is known of some, it hides the others.

    Args:
        rows: what is written.
        path: of the new file, which ends in .json or .json.gz.
        prefix: not used here.
        title: its title.

    Raises:
        DriverError: chemiscope is missing.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its own dependencies
            import chemiscope
    except ImportError as error:
        raise missing("chemiscope", error) from error
    properties = {name: found for name, found in _properties(rows).items() if found}
    settings = {"structure": [{"unitCell": any(one.frame.periodic for one in rows)}]}
    axes = [name for name in ("force uncertainty", "force error", "largest force", "step") if name in properties][:2]
    if len(axes) == 2:
        settings["map"] = {"x": {"property": axes[0]}, "y": {"property": axes[1]}}  # type: ignore[assignment]
    told = {"name": title, "description": "written by tumbaga export"}
    chemiscope.write_input(str(path), [atoms_of(one) for one in rows], metadata=told, properties=properties, settings=settings)


def _properties(rows: Sequence[Exported]) -> dict[str, dict[str, Any]]:
    numbers: dict[str, tuple[Sequence[Any], str]] = {
        "energy": ([None if one.label is None else one.label.energy for one in rows], "eV"),
        "energy per atom": ([None if one.label is None else one.label.energy / len(one.frame) for one in rows], "eV"),
        "largest force": ([None if one.label is None else _largest(one.label.forces) for one in rows], "eV/Å"),
        "force error": ([_error(one) for one in rows], "eV/Å"),
        "force uncertainty": ([one.facts.get("force_std") for one in rows], "eV/Å"),
        "step": ([one.facts.get("step") for one in rows], ""),
        "version": ([one.facts.get("version") for one in rows], ""),
        "atoms": ([len(one.frame) for one in rows], ""),
        "index": (list(range(len(rows))), ""),
    }
    found = {name: _numbers(values, units, _MEANING.get(name, "")) for name, (values, units) in numbers.items()}
    texts = ("role", "reason", "session", "method", "check", "problem")
    return found | {name: _texts([str(one.facts.get(name, "")) for one in rows]) for name in texts}


_MEANING = {
    "force error": "largest difference of an atom's labelled force from what was served",
    "force uncertainty": "largest calibrated force uncertainty when the frame was served",
    "version": "what had served the frame",
}


def _numbers(values: Sequence[Any], units: str, meaning: str) -> dict[str, Any]:
    """A quantity; NaN, which chemiscope's reader takes for "not known" and hides, where a frame has none. Nothing if no frame has it."""
    if all(value is None for value in values):
        return {}
    filled = [float("nan") if value is None else value for value in values]
    return {"target": "structure", "values": filled, "units": units, "description": meaning}


def _texts(values: list[str]) -> dict[str, Any]:
    return {"target": "structure", "values": [value or "-" for value in values]} if any(values) else {}


def _largest(vectors: Any) -> float:
    return float(np.linalg.norm(vectors, axis=1).max())


def _error(one: Exported) -> float | None:
    return None if one.label is None or one.served_forces is None else _largest(one.label.forces - one.served_forces)
