"""Gives back what starting up and loading have left behind.

Owns when garbage is looked for among what came to stay, and when free memory goes back to
the system. Must not know what was loaded. Invariant: called from the loop's thread, only
after something large was built; nothing but time and memory changes.
"""

from __future__ import annotations

import ctypes
import gc

_libc = ctypes.CDLL(None)


def settle() -> None:
    """Look for garbage once more, then keep() the rest. Takes a moment for each object."""
    gc.collect()
    keep()


def keep() -> None:
    """What is here now stays: collections need not look at it again, and the memory that
    its making has freed goes back to the system."""
    gc.freeze()
    if hasattr(_libc, "malloc_trim"):  # not with another C library than GNU's
        _libc.malloc_trim(0)
