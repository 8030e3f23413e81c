"""Work beside a model: it takes the time that the model leaves, and no more.

A thread at a low nice value still gets its share of a busy machine, so work is done on one
that the scheduler runs only where a core would be idle, and with rests where none is (see
`kvferry.node.pace`). Its matrix products must stay on that thread, or the BLAS's own
threads do them at full priority. Where a machine has no idle time at all, or somebody
waits, the work is done at a low priority instead.
"""

import contextlib
import ctypes
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Self, TypeVar

import numpy as np
from threadpoolctl import LibController, ThreadpoolController

from kvferry.node.pace import SHARE, Pace

T = TypeVar("T")

# Work of some 50 ms that takes longer gets no time at all. Done all the same this often,
# it costs a generation less than one per cent.
PATIENCE_S = 10.0
# <pthread/qos.h>: work that nobody waits for.
_QOS_CLASS_UTILITY = 0x11


class Background:
    """Runs pieces of work for one thread, in idle time as far as there is any.

    Work that got stuck is begun anew on the calling thread: it must not matter that it is
    done twice.

    Args:
        patience_s: so long a piece may take in idle time.
        share: of the time that work takes where all cores are busy.
    """

    def __init__(self, patience_s: float = PATIENCE_S, share: float = SHARE) -> None:
        self._patience_s = patience_s
        self._threads = ThreadPoolExecutor(1, "kvferry-idle-time", initializer=only_idle_time)
        self._wake = threading.Event()
        self._lock = threading.Lock()
        self._waiting = 0
        self._hurried = threading.Event()
        self._pace = Pace(self._hurried, share)

    def run(self, work: Callable[[], T]) -> T:
        """What ``work`` gives or raises. Belongs to one thread."""
        self._pace.begin()
        try:
            return self._run(work)
        finally:
            self._pace.done()

    def _run(self, work: Callable[[], T]) -> T:
        self._wake.clear()
        if self._waiting:
            return work()
        done = self._threads.submit(work)
        done.add_done_callback(lambda _: self._wake.set())
        self._wake.wait(self._patience_s)
        if done.done():
            return done.result()
        done.cancel()
        return work()

    @contextmanager
    def hurry(self) -> Iterator[None]:
        """Somebody waits: meanwhile nothing is left to idle time. From any thread."""
        with self._lock:
            self._waiting += 1
            self._hurried.set()
        self._wake.set()
        try:
            yield
        finally:
            with self._lock:
                self._waiting -= 1
                if not self._waiting:
                    self._hurried.clear()

    def close(self) -> None:
        """No more work comes."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def lower_priority() -> None:
    """This thread yields to others. Per thread on Linux; elsewhere left as it is."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


def only_idle_time() -> None:
    """From now on this thread runs when no other wants to. For good; never fails."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        try:
            os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))
        except OSError:
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, thread, 19)
    elif sys.platform == "darwin":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).pthread_set_qos_class_self_np(_QOS_CLASS_UTILITY, 0)


class OneThread:
    """While it is entered, NumPy's own BLAS stays on the threads that call it.

    The model's BLAS is another library and is left alone; so is one that NumPy shares
    with it. Threads that work at the same time are to share one of these.
    """

    def __init__(self) -> None:
        self._found: Sequence[LibController] | None = None
        self._lock = threading.Lock()
        self._inside = 0
        self._before: list[int] = []

    def __enter__(self) -> Self:
        with self._lock:
            if self._found is None:
                self._found = numpy_blas()
            self._inside += 1
            if self._inside == 1:
                self._before = [library.num_threads for library in self._found]
                for library in self._found:
                    library.set_num_threads(1)
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                for library, threads in zip(self._found or (), self._before, strict=True):
                    library.set_num_threads(threads)


def numpy_blas() -> list[LibController]:
    """The BLAS that came with NumPy, with its number of threads to be set."""
    folder = Path(np.__file__).parent
    places = (str(folder.parent / "numpy.libs"), str(folder))
    found: list[LibController] = ThreadpoolController().lib_controllers
    return [library for library in found if library.filepath.startswith(places)]
