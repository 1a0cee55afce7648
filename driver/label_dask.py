"""Labels on a Dask cluster of the user. The only file that knows Dask; it runs in the process of the label workers, and on the cluster.

Dask sends pickles both ways: whoever holds the scheduler can have anything executed where this module is used. So it is used in a process that
does nothing else, for an address that the user gave, and what comes back is bytes, which are decoded like those of a process of our own.

On a Dask worker a label is computed by a process of its own too: Dask cannot end a task that hangs, and a library that crashes would take
along all other tasks there. Restarting the worker instead (its nanny) would do the same.

A label under way is published on the scheduler under a name that follows from run and frame: if this process is killed, its successor finds
the label that was paid for, under way or ready, instead of a second one. A lost Dask worker's labels begin again on another one, by Dask.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import threading
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any, Final

import msgspec

from tumbaga.driver import process
from tumbaga.driver.label_child import asked, failed, label_of
from tumbaga.driver.label_pool import PREFIX, Notes
from tumbaga.driver.label_process import GivenUpError, LabelProcess, Log, Terms
from tumbaga.online.records import Frame, Label

_LOOK_S: Final = 0.2
_CONNECT_S: Final = 3.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
_REMIND_S: Final = 60.0
_IDLE_S: Final = 60.0  # then a process on the cluster leaves: whoever used it may be gone


# -- on the cluster --------------------------------------------------------------------------------------------------------------------

_spare: defaultdict[bytes, list[LabelProcess]] = defaultdict(list)  # labelling processes of this Dask worker that have nothing to do
_logger = logging.getLogger("distributed.worker")


def label_there(terms: bytes, ask: bytes) -> bytes:
    """Label one frame on a Dask worker; what makes it useless there (a cancelled task, the end of the worker) ends it.

    Args:
        terms: a `Terms`, msgpack.
        ask: of `label_child.asked`.

    Returns:
        The label or the reason of a failure, for `label_child.label_of`.

    Raises:
        Reschedule: of Dask; the label is not computed here.
    """
    from distributed import Reschedule

    unwanted = _unwanted_here()
    try:
        labelling = _spare[terms].pop()
    except IndexError:
        labelling = LabelProcess(msgspec.msgpack.decode(terms, type=Terms), f"{PREFIX}dask-", _log_there)
    try:
        answer = labelling.compute(ask, unwanted)
    except GivenUpError:
        raise Reschedule from None
    _spare[terms].append(labelling)
    return answer


def _unwanted_here() -> Callable[[], bool]:
    """Return what tells whether the task of this thread is not wanted any more."""
    from distributed import Status, get_worker

    worker = get_worker()
    key = worker.get_current_task()

    def unwanted() -> bool:
        task = worker.state.tasks.get(key)
        return task is None or task.state == "cancelled" or worker.status in (Status.closing, Status.closed)

    return unwanted


def _log_there(level: str, event: str, **detail: Any) -> None:
    _logger.warning("%s %s", event, detail)


# -- here ------------------------------------------------------------------------------------------------------------------------------


class DaskPool:
    """Labels on a cluster, several at a time, each waited for by a thread.

    Args:
        address: of the scheduler, e.g. "tcp://127.0.0.1:8786".
        terms: how a label is computed there.
        workers: labels at a time.
        name: of the run; labels of runs of one name are the same.
        log: of the worker; called from `turn` only.
    """

    def __init__(self, address: str, terms: Terms, workers: int, name: str, log: Log) -> None:
        self._address, self._name = address, name
        self._terms = msgspec.msgpack.encode(msgspec.structs.replace(terms, cores=(), idle_s=_IDLE_S))
        self._notes = Notes(log)
        self._stopping = threading.Event()
        self._connecting = threading.Lock()
        self._client: Any = None
        self._futures: dict[str, Any] = {}  # by key, until they are let go
        self._threads = ThreadPoolExecutor(workers, "label")
        logging.getLogger("distributed").setLevel(logging.CRITICAL)  # what matters is told in our own words

    def schedule(self, frame: Frame) -> Future[Label]:
        """Have a frame labelled on the cluster, as soon as there is one."""
        return self._threads.submit(self._compute, frame)

    def saved(self, frame: Frame) -> None:
        """The label need not be kept on the cluster any more."""
        self._threads.submit(self._let_go, self._key(asked(frame)))

    def _let_go(self, key: str) -> None:
        if self._client is not None:
            self._forget(self._client, key)

    def _key(self, ask: bytes) -> str:
        """The name of a label on the cluster: the same for the same frame, method, limits and run."""
        return f"tumbaga-{hashlib.sha256(b'/'.join((self._name.encode(), self._terms, ask))).hexdigest()[:32]}"

    def fileno(self) -> int:
        """Nothing to wait for."""
        return -1

    def turn(self) -> None:
        """Pass on what is to be logged."""
        self._notes.tell()

    def stop(self) -> None:
        """Cancel all labels under way, and disconnect."""
        self._stopping.set()
        self._threads.shutdown()
        self._disconnect()

    def _compute(self, frame: Frame) -> Label:
        ask, pause = asked(frame), _FIRST_PAUSE_S
        key = self._key(ask)
        while True:
            client = self._connected()
            try:
                return label_of(self._on_cluster(client, key, ask))
            except (CancelledError, OSError) as error:
                self._notes.add("warning", "Dask scheduler lost", address=self._address, why=_said(error))
            except _ClusterError as error:
                self._notes.add("error", "Dask cluster cannot label", address=self._address, why=str(error), again_in_s=pause)
                self._rest(pause)
                pause = min(2.0 * pause, _LONGEST_PAUSE_S)

    def _on_cluster(self, client: Any, key: str, ask: bytes) -> bytes:
        from distributed import KilledWorker

        self._futures[key] = future = client.submit(label_there, self._terms, ask, key=key, pure=False)
        client.publish_dataset(future, name=key, override=True)
        try:
            answer = self._waited_for(client, future)
        except (CancelledError, OSError):
            raise  # the scheduler is gone, or knows the label when we are back
        except GivenUpError:
            self._forget(client, key)
            raise
        except KilledWorker as error:
            answer = failed(f"the Dask workers died on this frame, {error.allowed_failures + 1} times")
        except Exception as error:
            # all that the method itself can do wrong is an answer: this is the cluster's, such as tumbaga not being installed there
            self._forget(client, key)
            raise _ClusterError(_said(error)) from error
        return answer

    def _waited_for(self, client: Any, future: Any) -> bytes:
        remind = process.monotonic() + _REMIND_S
        while True:
            try:
                answer: bytes = future.result(timeout=_LOOK_S)
                return answer
            except TimeoutError:
                if self._stopping.is_set():
                    raise GivenUpError from None
            if process.monotonic() > remind:
                remind = process.monotonic() + _REMIND_S
                if not client.nthreads():
                    self._notes.add("warning", "label waits", why=f"the Dask cluster at {self._address} has no workers")

    def _forget(self, client: Any, key: str) -> None:
        future = self._futures.pop(key, None)
        # without a connection there is nobody to be told; the answer, if there is one, is here
        with contextlib.suppress(CancelledError, OSError, RuntimeError):
            client.unpublish_dataset(key)
            client.cancel([future] if future is not None else [], force=True)

    def _connected(self) -> Any:
        """The client, once it is connected."""
        with self._connecting:
            pause = _FIRST_PAUSE_S
            while self._client is None or self._client.status != "running":
                self._disconnect()
                try:
                    self._client = _client(self._address)
                    self._notes.add("info", "connected to the Dask scheduler", address=self._address)
                except (OSError, ValueError, RuntimeError) as error:
                    why = _said(error)
                    self._notes.add("warning", "no Dask scheduler", address=self._address, why=why, again_in_s=pause)
                    self._rest(pause)
                    pause = min(2.0 * pause, _LONGEST_PAUSE_S)
            return self._client

    def _rest(self, seconds: float) -> None:
        if self._stopping.wait(seconds):
            raise GivenUpError

    def _disconnect(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            with contextlib.suppress(CancelledError, OSError, RuntimeError):
                client.close(timeout=_CONNECT_S)


class _ClusterError(Exception):
    """The cluster cannot do what it is asked for, whatever the frame."""


def _client(address: str) -> Any:
    from distributed import Client

    return Client(address, timeout=_CONNECT_S, set_as_default=False, name="tumbaga")


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
