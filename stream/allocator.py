"""What is freed goes back to the machine: memory follows what a service holds, not what it once held."""

from __future__ import annotations

import ctypes

# Of glibc's malloc.h.
_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8
_LARGE_BYTES = 128 * 1024


def return_what_is_freed() -> None:
    """Large blocks get pages of their own, which are returned when they are freed.

    By itself glibc raises the size at which it does so to that of the largest block ever freed: messages of
    a megabyte then come from the heap, and what is allocated between them keeps it from shrinking. Elsewhere
    this does nothing.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # no glibc
        return
    mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
    mallopt(_M_ARENA_MAX, 2)
