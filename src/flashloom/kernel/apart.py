"""Kernels for a second GPU target, each compiled in a process of its own.

Triton keeps the conversions of 8-bit floats that the first kernel of a process got, for all that follow. Kernels for
any other target would get instructions that it lacks, or other bytes than elsewhere.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import flashloom

if TYPE_CHECKING:
    from flashloom.kernel.triton import TritonKernel

__all__ = ["compiled", "ours"]

_target: dict[str, str] = {}  # that of this process


def ours(target: str) -> bool:
    """Whether this process compiles for the target: whoever asks first decides."""
    return _target.setdefault("name", target) == target


def compiled(kernel: TritonKernel) -> tuple[bytes, dict[str, Any]]:
    """What `kernel.binary()` answers, computed by a child process. Raises RuntimeError where that fails."""
    path = str(Path(flashloom.__file__).parents[1])
    inherited = os.environ.get("PYTHONPATH")
    environment = {**os.environ, "PYTHONPATH": path + (os.pathsep + inherited if inherited else "")}
    done = subprocess.run(
        [sys.executable, "-m", "flashloom.kernel.apart"], input=pickle.dumps((sys.path, pickle.dumps(kernel))),
        stdout=subprocess.PIPE, env=environment, check=False,
    )  # fmt: skip
    what = f"compiling {kernel.name} for {kernel.target} in a process of its own"
    if done.returncode:
        raise RuntimeError(f"{what} ended with status {done.returncode}")
    said, _, code = done.stdout.partition(b"\n")
    answer = json.loads(said)
    if "error" in answer:
        raise RuntimeError(f"{what} failed: {answer['error']}")
    return code, answer["kept"]


def main() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a compiler prints must not be taken for the answer
    path, made = pickle.load(sys.stdin.buffer)
    sys.path[:] = path
    code, answer = b"", {}
    try:
        code, answer["kept"] = pickle.loads(made).binary()
    except Exception as error:
        answer["error"] = f"{type(error).__name__}: {error}"
    answers.write(json.dumps(answer).encode() + b"\n" + code)
    answers.close()


if __name__ == "__main__":
    main()
