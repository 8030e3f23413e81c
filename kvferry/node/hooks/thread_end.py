"""Wait for the very end of a thread that ran a model, beyond what ``join`` waits for.

MLX keeps compiled functions per thread and frees them, Python objects among them, when the
thread ends. ``join`` returns before that, and a process that exits in between is aborted
("terminate called without an active exception").
"""

import sys
import time
from pathlib import Path

_TASKS = Path("/proc/self/task")
_STEP_S = 0.01
_BLIND_S = 0.2


def wait_ended(native_id: int | None, timeout_s: float = 5.0) -> None:
    """Until the system knows the joined thread no more; elsewhere than on Linux, a moment.

    Args:
        native_id: ``Thread.native_id``; None: it was never started.
    """
    if native_id is None:
        return
    if not sys.platform.startswith("linux") or not _TASKS.is_dir():
        time.sleep(_BLIND_S)
        return
    end = time.monotonic() + timeout_s
    while (_TASKS / str(native_id)).exists() and time.monotonic() < end:
        time.sleep(_STEP_S)
