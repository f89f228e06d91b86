"""Keeping memory that was freed, so that large tensors on a CPU do not cost their pages anew at every step."""

import ctypes

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # names of settings in malloc.h


def keep_freed_memory() -> bool:
    """Let the C library keep freed memory for what comes next, for the rest of the process.

    By default glibc maps every tensor of 32 MB or more into memory by itself and gives it back when it is freed; the
    kernel then clears its pages again for the next tensor. Evaluating 512 images at once takes twice the time for it.
    The price: the process stays as large as it ever was. For programs, such as the command line; a library should not
    decide it.

    Returns:
        Whether it could be set: on Linux with glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another C library, or Windows
        return False
    return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, -1))
