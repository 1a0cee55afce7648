"""What a benchmark's result says of the machine and the versions it was measured with."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform


def described() -> dict[str, str]:
    """Processor, cores, system, Python, the packages that matter, the day."""
    model = "unknown"
    try:
        with open("/proc/cpuinfo") as file:
            model = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), model)
    except OSError:
        pass
    packages = {name: importlib.metadata.version(name) for name in ("numpy", "torch", "ase", "ipi", "pyscf", "pyzmq")}
    return {
        "processor": model,
        "cores": str(os.cpu_count()),
        "system": platform.system(),
        "python": platform.python_version(),
        **packages,
        "date": datetime.date.today().isoformat(),
    }
