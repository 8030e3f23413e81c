"""Rests between pieces of work: where no core is idle, and only there."""

import itertools
import threading
import time

from kvferry.node.background import Background
from kvferry.node.pace import Pace, machine_idle_seconds


def worked(pace: Pace, seconds: float) -> None:
    pace.begin()
    time.sleep(seconds)
    pace.done()


def rested(pace: Pace) -> float:
    started = time.monotonic()
    pace.begin()
    return time.monotonic() - started


def test_where_all_cores_are_busy_work_takes_its_share_of_the_time() -> None:
    pace = Pace(threading.Event(), 0.1, lambda: 0.0)
    worked(pace, 0.05)
    assert rested(pace) >= 0.4
    pace = Pace(threading.Event(), 0.5, lambda: 0.0)
    worked(pace, 0.001)
    assert rested(pace) < 0.4  # hardly any work, hardly any rest


def test_where_a_core_is_idle_nobody_rests() -> None:
    pace = Pace(threading.Event(), 1e-6, time.monotonic)  # one core, all the time
    worked(pace, 0.05)
    assert rested(pace) < 1.0


def test_a_rest_ends_when_a_core_becomes_idle() -> None:
    idle = itertools.chain([0.0, 0.0, 0.0, 0.0], itertools.count(1000.0, 1000.0))
    pace = Pace(threading.Event(), 1e-6, lambda: next(idle))
    worked(pace, 0.05)
    assert rested(pace) < 3.0


def test_who_waits_ends_a_rest() -> None:
    wake = threading.Event()
    pace = Pace(wake, 1e-6, lambda: 0.0)
    worked(pace, 0.05)
    threading.Timer(0.05, wake.set).start()
    assert rested(pace) < 3.0
    worked(pace, 0.05)
    assert rested(pace) < 3.0  # nor does a new one begin


def test_background_work_under_way_is_hurried_out_of_its_rest() -> None:
    background = Background(share=1e-6)
    background._pace = Pace(background._hurried, 1e-6, lambda: 0.0)
    background.run(lambda: time.sleep(0.02))
    done = threading.Event()
    work = threading.Thread(target=lambda: background.run(done.set))
    work.start()
    assert not done.wait(0.3)
    with background.hurry():
        assert done.wait(3.0)
    work.join()
    background.close()


def test_a_machine_says_how_long_its_cores_were_idle() -> None:
    before = machine_idle_seconds()
    time.sleep(0.05)
    assert machine_idle_seconds() >= before > 0
