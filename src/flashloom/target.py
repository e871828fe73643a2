"""What we compile for: a named instruction set that stands for the same compiler flags on every machine.

``Target.here()`` finds the best one of this machine, ``FLASHLOOM_TARGET`` overrides it. Never ``-march=native``: a
kernel's
key holds the target's name, so the name has to mean the same machine code everywhere.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import re
from typing import Any

from flashloom import settings
from flashloom.dataclass import dataclass

__all__ = ["CPU_TARGETS", "Target", "cpu_features"]

# Per CPU target: the features of /proc/cpuinfo it needs, and the flags g++ and clang++ share for them.
_AVX2 = ("avx2", "fma", "f16c", "bmi1", "bmi2")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512cd", "avx512_vnni")
_AMX = (*_AVX512, "avx512_bf16", "avx512vbmi", "amx_tile", "amx_bf16", "amx_int8")
CPU_TARGETS: dict[str, tuple[str, ...]] = {
    "x86-amx": _AMX,  # Intel Sapphire Rapids (2023) and later
    "x86-avx512": _AVX512,  # Intel Cascade Lake (2019), AMD Zen 4 (2022) and later
    "x86-avx2": _AVX2,  # Intel Haswell (2013), AMD Zen (2017) and later
    "x86": (),  # every x86-64: SSE2
    "aarch64": (),  # every 64-bit ARM: NEON
}
_FLAGS = {"bmi1": "-mbmi", "avx512_vnni": "-mavx512vnni", "avx512_bf16": "-mavx512bf16"}

_ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA, _SYS_ARCH_PRCTL = 0x1023, 18, 158


@dataclass(frozen=True)
class Target:
    """A machine to compile for: one of ``CPU_TARGETS``, or ``sm<NN>`` for an NVIDIA GPU, ``gfx<...>`` for an AMD
    one.
    """

    name: str

    def __post_init__(self) -> None:
        if self.name not in CPU_TARGETS and not re.fullmatch(r"sm\d{2,3}|gfx[0-9a-f]{3,4}", self.name):
            names = ", ".join(CPU_TARGETS)
            raise ValueError(
                f"Target {self.name!r} is unknown; give {names}, sm<NN> such as sm90, or gfx<NNN> such as gfx942"
            )

    def __str__(self) -> str:
        return self.name

    @property
    def is_cpu(self) -> bool:
        """True for a CPU, False for a GPU."""
        return self.name in CPU_TARGETS

    @property
    def flags(self) -> tuple[str, ...]:
        """Explicit instruction-set flags, the same for g++ and clang++. Raises ValueError for a GPU."""
        if not self.is_cpu:
            raise ValueError(f"Target {self.name!r} is a GPU and has no C++ compiler flags; ask a CPU target")
        return tuple(_FLAGS.get(feature, "-m" + feature.replace("_", "-")) for feature in CPU_TARGETS[self.name])

    @property
    def supported(self) -> bool:
        """Whether this machine's CPU can run code for the target (False for GPU targets)."""
        if not self.is_cpu or (self.name == "aarch64") != (platform.machine() in ("aarch64", "arm64")):
            return False
        needs = set(CPU_TARGETS[self.name])
        return needs <= cpu_features() and ("amx_tile" not in needs or _amx_allowed())

    @classmethod
    def here(cls) -> Target:
        """The best CPU target that this machine runs, or ``FLASHLOOM_TARGET``.

        Raises ValueError when the setting names a target that this machine cannot run.
        """
        return _here(settings.get().target)

    @classmethod
    def of(cls, device: Any) -> Target:
        """That of a torch.device: the GPU's, or `here()` for the CPU."""
        if device.type == "cpu":
            return cls.here()
        import torch

        return cls("sm{}{}".format(*torch.cuda.get_device_capability(device)))

    @property
    def lesser(self) -> list[Target]:
        """CPU targets whose code runs wherever this one's does, the best first."""
        names = list(CPU_TARGETS)
        mine = set(CPU_TARGETS[self.name]) if self.is_cpu else set()
        after = names[names.index(self.name) + 1 :] if self.is_cpu else []
        same = [name for name in after if (name == "aarch64") == (self.name == "aarch64")]
        return [Target(name) for name in same if set(CPU_TARGETS[name]) <= mine]


@functools.lru_cache
def _here(name: str | None) -> Target:
    if name is None:
        return next(target for target in map(Target, CPU_TARGETS) if target.supported)
    target = Target(name)
    if not target.supported:
        able = ", ".join(other for other in CPU_TARGETS if Target(other).supported)
        raise ValueError(f"FLASHLOOM_TARGET={name} cannot run on this machine; it runs {able}")
    return target


@functools.lru_cache
def cpu_features() -> frozenset[str]:
    """Instruction-set names of the first CPU in /proc/cpuinfo (``flags`` on x86, ``Features`` on ARM)."""
    try:
        with open("/proc/cpuinfo") as file:
            found = re.search(r"^(?:flags|Features)\s*:(.*)$", file.read(), re.MULTILINE)
    except OSError:
        return frozenset()
    return frozenset(found[1].split() if found else ())


@functools.lru_cache
def _amx_allowed() -> bool:
    """Ask Linux for the AMX tile registers; a process that uses them without this is killed by SIGILL.

    The permission holds for all threads of the process and for what it starts later.
    """
    return ctypes.CDLL(None).syscall(_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA) == 0
