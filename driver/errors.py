"""Errors of the program: what a user can mend, in one sentence. The command line prints the sentence and never a traceback."""

from __future__ import annotations


class DriverError(Exception):
    """Base of all errors of ``tumbaga.driver``; its string is a sentence for the user."""


class ConfigError(DriverError):
    """A setting is wrong.

    Args:
        key: where, e.g. "label.method" or a command-line flag.
        problem: what is wrong and how to mend it.
    """

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(key, problem)
        self.key, self.problem = key, problem

    def __str__(self) -> str:
        return f"{self.key}: {self.problem}"


class RunDirError(DriverError):
    """A run directory cannot be used the way the user asked."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(path, problem)
        self.path, self.problem = path, problem

    def __str__(self) -> str:
        return f"run directory {self.path}: {self.problem}"


class PotentialError(DriverError):
    """A potential cannot be found or loaded."""

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(name, problem)
        self.name, self.problem = name, problem

    def __str__(self) -> str:
        return f"potential {self.name}: {self.problem}"


class EngineError(DriverError):
    """An engine that tumbaga started did not do its work."""

    def __init__(self, engine: str, problem: str) -> None:
        super().__init__(engine, problem)
        self.engine, self.problem = engine, problem

    def __str__(self) -> str:
        return f"{self.engine}: {self.problem}"


class DataError(DriverError):
    """A data set cannot be read, or a frame of it is not fit to learn from or to judge by.

    Args:
        path: of the file.
        problem: what is wrong and how to mend it.
        frame: which frame of the file, counted from 0 as ASE does; None where it is the file as a whole.
    """

    def __init__(self, path: str, problem: str, frame: int | None = None) -> None:
        super().__init__(path, problem, frame)
        self.path, self.problem, self.frame = path, problem, frame

    def __str__(self) -> str:
        where = "" if self.frame is None else f", frame {self.frame} (the first is 0)"
        return f"data {self.path}{where}: {self.problem}"
