"""What the workspaces of live plans take together, and the bound on it: `fl.configure(memory_pool_size=...)`."""

from __future__ import annotations

import gc
import os
import threading
import weakref

import torch

from flashloom import settings

__all__ = ["claim", "describe", "held", "totals"]

_lock = threading.RLock()
#: Bytes by the object that owns them; an owner that is gone owns nothing.
_claims: weakref.WeakKeyDictionary[object, tuple[torch.device, int]] = weakref.WeakKeyDictionary()


def _after_fork() -> None:
    global _lock
    _lock = threading.RLock()  # a thread that held it is not in this process


os.register_at_fork(after_in_child=_after_fork)


def held(device: torch.device, but: object = None) -> int:
    """Bytes that plans' workspaces hold on a device, without those of the owner `but`."""
    with _lock:
        return sum(size for owner, (place, size) in _claims.items() if place == device and owner is not but)


def totals() -> dict[str, int]:
    """`held` of every device that holds any, by the device's name."""
    with _lock:
        devices = {str(place): place for place, size in _claims.values() if size}
        return {name: held(place) for name, place in sorted(devices.items())}


def claim(owner: object, device: torch.device, size: int) -> None:
    """From now on `owner` holds `size` bytes on the device. Raises MemoryError, and changes nothing, if all owners
    together would then hold more than the bound."""
    with _lock:
        limit = settings.get().memory_pool_size
        if limit is not None and held(device, owner) + size > limit:
            gc.collect()  # plans that nobody can reach any more
            others = held(device, owner)
            if others + size > limit:
                raise MemoryError(
                    f"a plan needs a workspace of {size} bytes on {device}, where other plans hold {others}: "
                    f"memory_pool_size allows {limit} in all; drop plans, reserve less, or raise it with "
                    f"fl.configure(memory_pool_size={others + size})"
                )
        _claims[owner] = (device, size)


def describe(device: torch.device) -> str:
    """One line for `plan.explain()`."""
    limit = settings.get().memory_pool_size
    bound = "without a bound" if limit is None else f"of at most {limit} (memory_pool_size)"
    return f"workspaces of all plans on {device}: {held(device)} bytes, {bound}"
