"""PySCF's SCF and gradients on a graphics card, through gpu4pyscf. Written from its documentation; not run by the project's tests.

Everything else of the engine sees the same objects on the host, before and after.
"""

from __future__ import annotations

import importlib.util
from typing import Any

from tumbaga.online.records import Array


def found() -> bool:
    """Whether gpu4pyscf is installed and CUDA sees a device."""
    if importlib.util.find_spec("gpu4pyscf") is None or importlib.util.find_spec("cupy") is None:
        return False
    import cupy  # type: ignore[import-not-found, unused-ignore]

    try:
        return int(cupy.cuda.runtime.getDeviceCount()) > 0
    except cupy.cuda.runtime.CUDARuntimeError:
        return False


def run(made: Any, start: Array | None, gpu: bool) -> Any:
    """Run an SCF from a density matrix, or from its own guess if None, and return PySCF's object on the host."""
    if not gpu:
        made.kernel(dm0=start)
        return made
    device = made.to_gpu()
    device.kernel(dm0=start)
    return device.to_cpu()


def gradient(done: Any, gpu: bool) -> Any:
    """PySCF's gradient object of a converged SCF, on the card or on the host; its `kernel` returns Hartree/Bohr."""
    return (done.to_gpu() if gpu else done).nuc_grad_method()
