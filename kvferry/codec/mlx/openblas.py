"""OpenBLAS on Linux: the mlx-cpu wheel multiplies ten times faster with it preloaded.

A library can be preloaded only when a process starts, so children get an environment
and a command that runs the model itself starts once more. glibc is told not to map and
fault every large array anew, which is most of the system time of a prefill. Imports no
mlx.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

PRELOAD = "LD_PRELOAD"
GUARD = "KVFERRY_OPENBLAS_TRIED"
_MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(512 << 20),
}
HINT = (
    "kvferry: no OpenBLAS found, the model will run about ten times slower; "
    "on Debian or Ubuntu: sudo apt install libopenblas0-pthread"
)
_FOLDERS = ("/usr/lib", "/usr/lib64", "/usr/local/lib", "/opt/OpenBLAS/lib")
_PATTERNS = (
    "openblas-pthread/libopenblas.so.0",
    "*/openblas-pthread/libopenblas.so.0",
    "libopenblasp.so.0",
    "libopenblas.so.0",
    "*/libopenblas.so.0",
)


def find_openblas(folders: Sequence[str] = _FOLDERS) -> Path | None:
    """The threaded OpenBLAS of this machine; None where there is none, or no need (macOS)."""
    if not sys.platform.startswith("linux"):
        return None
    for pattern in _PATTERNS:
        for folder in folders:
            found = sorted(Path(folder).glob(pattern))
            if found:
                return found[0]
    return None


def _loaded(environment: Mapping[str, str]) -> bool:
    return "openblas" in environment.get(PRELOAD, "")


def model_environment() -> dict[str, str]:
    """What to add to the environment of a child process that runs the model."""
    if not sys.platform.startswith("linux"):
        return {}
    library = find_openblas()
    if library is None or _loaded(os.environ):
        return dict(_MALLOC)
    already = os.environ.get(PRELOAD, "")
    return _MALLOC | {PRELOAD: f"{library}:{already}".rstrip(":"), GUARD: "1"}


def ensure_openblas() -> None:
    """Start this process anew with OpenBLAS preloaded, once, on Linux.

    Call it first in a command that runs the model: nothing before it may hold state.
    Where no library is found one line on standard error says how to get it.
    """
    if not sys.platform.startswith("linux") or _loaded(os.environ) or GUARD in os.environ:
        return
    added = model_environment()
    if PRELOAD not in added:
        os.environ[GUARD] = "1"
        sys.stderr.write(HINT + "\n")
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], dict(os.environ) | added)  # noqa: S606
