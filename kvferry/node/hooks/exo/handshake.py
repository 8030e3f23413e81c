"""Whether kvferry is in every rank's runner, asked without a collective of our own.

Where one machine runs plain exo, a collective that only the others enter would be answered
by whatever exo does next: a hang, or nonsense. So the question rides on a barrier of exo's
own at the end of loading. exo sums ones there, and does not look at the sum.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

# Exact in float32, for thousands of ranks. Another for every change of the collectives
# that runners enter together.
MARK = 2.0**-10


class Handshake:
    """A stand-in for exo's ``mx_barrier``.

    Attributes:
        everyone: every rank of the group was here with the same mark.
    """

    def __init__(self, group: Any) -> None:
        self.everyone = group is None or group.size() == 1
        self._group = group

    def barrier(self, group: Any) -> None:
        """Wait for all ranks, as exo's does."""
        if group is None:
            return
        mine = 1.0 + MARK
        stream = mx.default_stream(mx.Device(mx.cpu))
        total = mx.distributed.all_sum(mx.array(mine), group=group, stream=stream)
        mx.eval(total)
        if group is self._group:
            self.everyone = bool(total.item() == mine * group.size())


@contextmanager
def asking(utils: Any, group: Any) -> Generator[Handshake]:
    """While exo loads a model in here, its barrier asks.

    Args:
        utils: exo's module ``utils_mlx``.
    """
    handshake = Handshake(group)
    before: Callable[[Any], None] = utils.mx_barrier
    utils.mx_barrier = handshake.barrier
    try:
        yield handshake
    finally:
        utils.mx_barrier = before
