"""What a process inherits by fork and must not use: threads and GPUs.

The pool of threads in which kernels and torch compute does not exist in a forked child: a parallel region there would
wait for it for ever. So the child of a process that has planned attention computes on one thread. A GPU cannot be used
in the child of a process that used it; `kernel.cuda` says so. Children that need either are started with the
multiprocessing method "spawn" or "forkserver"."""

from __future__ import annotations

import os

__all__ = ["in_use", "one_thread"]

in_use = False
"""Set where attention is planned: from then on forked children compute on one thread."""
one_thread = False
"""Whether this process must compute on one thread."""


def _after_fork() -> None:
    global one_thread
    if in_use:
        import torch

        one_thread = True
        torch.set_num_threads(1)


os.register_at_fork(after_in_child=_after_fork)
