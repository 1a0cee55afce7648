"""Figures of matplotlib as PNG files, without a display; matplotlib is imported only when it is asked for."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tumbaga.driver.errors import ConfigError
from tumbaga.online.versions import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def available() -> bool:
    """Whether matplotlib is installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def write(folder: Path, figures: Mapping[str, Figure], option: str) -> list[Path]:
    """Write each figure, whole or not at all; return the paths.

    Args:
        folder: made if it is not there.
        figures: by file name.
        option: that named the folder, for the error.

    Raises:
        ConfigError: a file cannot be written.
    """
    for name, figure in figures.items():
        data = io.BytesIO()
        figure.savefig(data, format="png", dpi=150, bbox_inches="tight")
        try:
            write_whole(folder / name, data.getvalue())
        except OSError as error:
            raise ConfigError(option, f"{folder / name} cannot be written ({error.strerror})") from error
    return [folder / name for name in figures]
