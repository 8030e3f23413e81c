"""Work in idle time: done by whom, and that it is done whatever the machine is doing."""

import sys
import threading

import numpy as np
import pytest
from node_samples import wait_for

from kvferry.node.background import Background, OneThread, numpy_blas


@pytest.fixture
def background() -> Background:
    return Background(patience_s=0.05)


def test_what_work_gives_and_raises_comes_back(background: Background) -> None:
    assert background.run(lambda: 41 + 1) == 42
    with pytest.raises(OSError, match="disk"):
        background.run(lambda: (_ for _ in ()).throw(OSError("disk")))
    background.close()


@pytest.mark.skipif(sys.platform != "linux", reason="scheduling classes of Linux")
def test_work_runs_only_in_idle_time_and_the_caller_keeps_its_own(background: Background) -> None:
    import os

    patient = Background()
    assert patient.run(lambda: os.sched_getscheduler(0)) == os.SCHED_IDLE
    assert os.sched_getscheduler(0) == os.SCHED_OTHER
    with patient.hurry():
        assert patient.run(threading.get_ident) == threading.get_ident()
    assert patient.run(threading.get_ident) != threading.get_ident()
    patient.close()


def test_a_machine_without_idle_time_does_the_work_all_the_same(background: Background) -> None:
    stuck = threading.Event()

    def work() -> str:
        if threading.current_thread().name.startswith("kvferry-idle-time"):
            stuck.wait(30)
        return "done"

    try:
        assert [background.run(work) for _ in range(3)] == ["done"] * 3
    finally:
        stuck.set()
    wait_for(lambda: background.run(threading.get_ident) != threading.get_ident())
    background.close()


def test_who_begins_to_wait_is_not_kept_waiting_by_work_under_way() -> None:
    patient, begun, stuck = Background(patience_s=60), threading.Event(), threading.Event()
    found: list[str] = []

    def work() -> str:
        name = threading.current_thread().name
        if name.startswith("kvferry-idle-time"):
            begun.set()
            stuck.wait(30)
        return name

    offering = threading.Thread(target=lambda: found.append(patient.run(work)), name="offers")
    offering.start()
    assert begun.wait(10)
    with patient.hurry():
        offering.join(10)
    assert found == ["offers"]
    stuck.set()
    patient.close()


def test_numpys_products_stay_on_one_thread_and_go_back() -> None:
    libraries = numpy_blas()
    before = [library.num_threads for library in libraries]
    one = OneThread()
    with one, one:
        assert all(library.num_threads == 1 for library in libraries)
        values = np.ones((8, 8), np.float32)
        assert (values @ values == 8).all()
    assert [library.num_threads for library in libraries] == before


def test_a_raised_error_gives_the_threads_back_too() -> None:
    libraries = numpy_blas()
    before = [library.num_threads for library in libraries]
    with pytest.raises(ValueError, match="bad page"), OneThread():
        raise ValueError("bad page")
    assert [library.num_threads for library in libraries] == before
