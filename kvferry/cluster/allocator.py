"""glibc's allocator, set so that large messages reuse memory (design section 6.2)."""

import ctypes
import sys

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3


def tune_allocator(mmap_threshold: int = 1 << 30, trim_threshold: int = 512 << 20) -> bool:
    """Keep freed memory for the next message instead of mapping and faulting it anew.

    Commands that move blobs call this once at start. Sizes in bytes. Returns False
    where the C library is not glibc, or refuses the figures; nothing is changed then.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        libc = ctypes.CDLL(None)
        mapped = libc.mallopt(_M_MMAP_THRESHOLD, mmap_threshold)
        return bool(mapped and libc.mallopt(_M_TRIM_THRESHOLD, trim_threshold))
    except (OSError, AttributeError):
        return False


def release_memory() -> None:
    """Give memory that lies idle back to the system; for moments without traffic."""
    if sys.platform.startswith("linux"):
        try:
            ctypes.CDLL(None).malloc_trim(0)
        except (OSError, AttributeError):
            return
