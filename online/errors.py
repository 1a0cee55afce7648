"""Errors of the learning room, by cause. The constructor takes facts, the class makes the sentence; facts in ``args`` keep them picklable."""

from __future__ import annotations

import errno


class OnlineError(Exception):
    """Base of all errors of ``tumbaga.online``."""


class BadFrameError(OnlineError, ValueError):
    """A frame or a label holds something that no potential can be asked about."""

    def __init__(self, what: str, problem: str) -> None:
        super().__init__(what, problem)
        self.what, self.problem = what, problem

    def __str__(self) -> str:
        return f"{self.what} {self.problem}"


class LabelFailedError(OnlineError):
    """A label could not be computed; the reason is kept and nothing is learnt from it."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


class UpdateRefusedError(OnlineError):
    """A last-layer update was computed but must not serve."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


class StoreError(OnlineError):
    """The store cannot be read or written the way it was asked."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(path, problem)
        self.path, self.problem = path, problem

    def __str__(self) -> str:
        return f"store {self.path} {self.problem}"


class StoreFullError(StoreError):
    """There is no room for what should be stored; the store is as it was, and takes it when there is room again."""

    def __init__(self, path: str) -> None:
        super().__init__(path, "cannot be written: the disk is full")
        self.args = (path,)


def is_full(error: Exception) -> bool:
    """Whether something could not be written because the disk, the user's quota or the largest allowed file is full."""
    return isinstance(error, StoreFullError) or (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))


class VersionError(OnlineError):
    """A version file must not serve."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(path, problem)
        self.path, self.problem = path, problem

    def __str__(self) -> str:
        return f"version file {self.path} {self.problem}"


class TrainingError(OnlineError):
    """A training cannot be done, or not gone on with, as it was asked for."""

    def __init__(self, what: str, problem: str) -> None:
        super().__init__(what, problem)
        self.what, self.problem = what, problem

    def __str__(self) -> str:
        return f"{self.what} {self.problem}"


class TrainingStoppedError(OnlineError):
    """A training was told to stop; what it has done is on disk."""

    def __init__(self, folder: str, epoch: int) -> None:
        super().__init__(folder, epoch)
        self.folder, self.epoch = folder, epoch

    def __str__(self) -> str:
        return f"the training in {self.folder} was stopped in epoch {self.epoch}; it can go on from there"
