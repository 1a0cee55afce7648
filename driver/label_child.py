"""The process in which labels are computed. It takes frames from standard input, one at a time, and answers on what was standard output.

It knows nothing of a run. Whoever started it holds its standard input; when that ends, by whatever death, this process removes its folder
and takes its whole session along, so that programs which a calculator has started go too. What foreign code prints goes to standard error.
Both ways: 8 bytes of length, then msgpack. It says what is wrong with the method, or nothing, in a first message; and answers each frame with
an empty one when it begins and with the label when it has ended. `label_process` is the other side.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import queue
import shutil
import signal
import threading
from pathlib import Path
from typing import IO, Any, Final

import msgspec
import numpy as np

from tumbaga.online.errors import LabelFailedError, OnlineError
from tumbaga.online.labels.factory import make_labeller
from tumbaga.online.labels.repeating import Repeating
from tumbaga.online.ports import Labeller
from tumbaga.online.records import Frame, Label

HEAD: Final = 8  # bytes of a length
EXIT_IDLE: Final = 75  # it left by itself, having had nothing to do (EX_TEMPFAIL of sysexits.h)
_LABELS: Final = 100  # then a new process: foreign libraries leak
_MOST_TEXT: Final = 2000  # characters of a foreign error that are kept


class Setup(msgspec.Struct, frozen=True, array_like=True):
    """The first message: how this process is to label.

    `idle_s` is how long it waits for a frame before it leaves, 0 for ever. In the folder `keep`, unless empty, each answer is kept as a file
    from before it is sent: whoever asked may be gone, and the next one find it.
    """

    method: str
    options: dict[str, Any]
    cores: tuple[int, ...]  # that it may use; empty for all
    idle_s: float
    keep: str = ""
    repeat_every: int = 0  # frames of which one is labelled twice; see `Repeating`


class Ask(msgspec.Struct, frozen=True, array_like=True):
    """Label one frame: numbers int64, positions float64 Å, cell float64 Å."""

    numbers: bytes
    positions: bytes
    cell: bytes
    periodic: bool


class Told(msgspec.Struct, frozen=True, array_like=True):
    """The label: energy eV, forces float64 eV/Å, details as JSON, virial float64 eV if there is one; or the reason why there is none."""

    energy: float = 0.0
    forces: bytes = b""
    method: str = ""
    seconds: float = 0.0
    details: str = "{}"
    virial: bytes = b""
    failure: str = ""


def asked(frame: Frame) -> bytes:
    """Return the message that asks for the label of a frame."""
    return msgspec.msgpack.encode(Ask(frame.numbers.tobytes(), frame.positions.tobytes(), frame.cell.tobytes(), frame.periodic))


def told(label: Label) -> bytes:
    """Return the message that holds a label.

    Raises:
        LabelFailedError: its details are not JSON.
    """
    try:
        details = json.dumps(label.details)
    except (TypeError, ValueError) as error:
        raise LabelFailedError(f"the details of the label cannot be kept as JSON: {error}") from error
    virial = b"" if label.virial is None else label.virial.tobytes()
    return msgspec.msgpack.encode(Told(label.energy, label.forces.tobytes(), label.method, label.seconds, details, virial))


def failed(reason: str) -> bytes:
    """Return the message that says why there is no label."""
    return msgspec.msgpack.encode(Told(failure=reason[:_MOST_TEXT] or "it failed without a word"))


def kept_file(folder: str, method: str, options: dict[str, Any], ask: bytes) -> Path:
    """Return where the answer to an ask is kept."""
    asked_of = msgspec.json.encode([method, options], order="deterministic")
    return Path(folder) / f"{hashlib.sha256(asked_of + ask).hexdigest()[:32]}.answer"


def label_of(answer: bytes) -> Label:
    """Return the label that an answer holds.

    Raises:
        LabelFailedError: it says why there is none, or is no answer.
        BadFrameError: a shape is wrong, or a number is not finite.
    """
    try:
        made = msgspec.msgpack.decode(answer, type=Told)
        forces, virial = _vectors(made.forces), _vectors(made.virial) if made.virial else None
        details = json.loads(made.details)
    except (msgspec.DecodeError, ValueError) as error:
        raise LabelFailedError(f"the labelling process sent no label: {error}") from error
    if made.failure:
        raise LabelFailedError(made.failure)
    return Label(made.energy, forces, made.method, made.seconds, details, virial)


def _vectors(buffer: bytes) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.frombuffer(buffer, dtype=np.float64).reshape(-1, 3)


# -- processes of a session ------------------------------------------------------------------------------------------------------------


def kill_session(leader: int) -> None:
    """Kill the leader of a session and all its members; without /proc only those of its process group."""
    _kill_others(leader)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


def _kill_others(leader: int) -> None:
    for pid in _session(leader):
        if pid != leader:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)


def _session(leader: int) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # pid (name) state ppid pgrp session …; the name may hold anything
            if int(entry.read_bytes().rpartition(b")")[2].split()[3]) == leader:
                found.append(int(entry.parent.name))
    return found


# -- the program -----------------------------------------------------------------------------------------------------------------------


def send(stream: IO[bytes], message: bytes) -> None:
    """Write one message."""
    stream.write(len(message).to_bytes(HEAD, "little") + message)
    stream.flush()


def _receive(stream: IO[bytes]) -> bytes | None:
    head = stream.read(HEAD)
    message = stream.read(int.from_bytes(head, "little"))
    return message if len(head) == HEAD and len(message) == int.from_bytes(head, "little") else None


def _listen(stream: IO[bytes], messages: queue.SimpleQueue[bytes]) -> None:
    while (message := _receive(stream)) is not None:
        messages.put(message)
    _leave(0)


def _leave(code: int) -> None:
    shutil.rmtree(os.getcwd(), ignore_errors=True)
    _kill_others(os.getpid())
    os._exit(code)


def _behave(setup: Setup) -> None:
    """The simulation comes first, in time and in memory."""
    os.nice(10)
    # where memory runs out, the system takes this process and not the one that serves
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    if setup.cores and hasattr(os, "sched_setaffinity"):
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, setup.cores)


def _answer(labeller: Labeller, message: bytes) -> bytes:
    ask = msgspec.msgpack.decode(message, type=Ask)
    frame = Frame(np.frombuffer(ask.numbers, dtype=np.int64), _vectors(ask.positions), _vectors(ask.cell), ask.periodic)
    try:
        return told(labeller.label(frame))
    except OnlineError as error:
        return failed(str(error))
    except MemoryError:
        return failed("the labelling process could get no more memory")
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a foreign engine may raise anything: it is the reason, and it is recorded
        return failed(f"{type(error).__name__}: {error}")


def _prepared(labeller: Repeating) -> str:
    """Have a labeller that can do so import what it needs; return what is wrong with it, for every frame, or nothing."""
    try:
        labeller.prepare()
    except LabelFailedError as error:
        return f"cannot be used: {error}"[:_MOST_TEXT]
    return ""


def _keep(file: Path, answer: bytes) -> None:
    part = file.with_suffix(".part")
    with contextlib.suppress(OSError):  # a full disk: then the answer is in the pipe alone
        part.write_bytes(answer)
        part.replace(file)


def main() -> None:
    """Label until there is nothing to do, or nobody to do it for."""
    # copies that no program of a calculator inherits; those get an empty input and the log
    asks, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    messages: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(asks, messages), name="listen", daemon=True).start()
    setup = msgspec.msgpack.decode(messages.get(), type=Setup)
    _behave(setup)
    with contextlib.suppress(BrokenPipeError, queue.Empty):  # whoever asked is gone, or asks no more
        _work(setup, messages, answers)
    _leave(EXIT_IDLE)


def _work(setup: Setup, messages: queue.SimpleQueue[bytes], answers: IO[bytes]) -> None:
    labeller = Repeating(make_labeller(setup.method, **setup.options), setup.repeat_every)
    send(answers, _prepared(labeller).encode())
    for _ in range(_LABELS):
        message = messages.get(timeout=setup.idle_s or None)
        send(answers, b"")  # it has begun: if this process dies now, the frame may be why
        answer = _answer(labeller, message)
        if setup.keep:
            _keep(kept_file(setup.keep, setup.method, setup.options, message), answer)
        send(answers, answer)


if __name__ == "__main__":
    main()
