"""Whether a machine that said goodbye is awake."""

from kvferry.node.nap import Nap


class Clocks:
    """Both clocks of a machine."""

    running, wall = 100.0, 5000.0

    def passes(self, seconds: float, asleep: float = 0.0) -> None:
        self.running += seconds
        self.wall += seconds + asleep


def nap_of(clocks: Clocks) -> Nap:
    return Nap(lambda: clocks.running, lambda: clocks.wall, 60.0)


def test_it_is_over_when_the_machine_slept() -> None:
    clocks = Clocks()
    nap = nap_of(clocks)
    clocks.passes(5.0)
    assert nap.over(False) == ""
    clocks.passes(0.5, asleep=3600.0)
    assert "slept" in nap.over(False)


def test_it_is_over_when_somebody_works_or_it_was_called_off() -> None:
    clocks = Clocks()
    nap = nap_of(clocks)
    assert "hook" in nap.over(True)
    clocks.passes(59.0)
    assert nap.over(False) == ""
    clocks.passes(2.0)
    assert "did not sleep" in nap.over(False)


def test_a_clock_set_by_a_moment_or_back_is_no_sleep() -> None:
    clocks = Clocks()
    nap = nap_of(clocks)
    clocks.passes(1.0, asleep=0.9)
    clocks.passes(1.0, asleep=-500.0)
    assert nap.over(False) == ""
