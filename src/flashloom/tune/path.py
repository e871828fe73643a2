"""Where an engine keeps the records of one rank of one configuration."""

from __future__ import annotations

import hashlib
import json
import os
from importlib import metadata
from pathlib import Path

import platformdirs
import torch

from flashloom import settings
from flashloom.target import Target

__all__ = ["tune_cache_path"]


def tune_cache_path(
    *,
    model: str,
    dtype: str | torch.dtype,
    quantization: str | None = None,
    backend: str | None = None,
    tp: tuple[int, int] = (0, 1),
    pp: tuple[int, int] = (0, 1),
    dp: tuple[int, int] = (0, 1),
    ep: tuple[int, int] = (0, 1),
    config: str | type = "",
    root: str | os.PathLike[str] | None = None,
) -> Path:
    """The `cache=` of a rank: `root/version/architecture/<16 hex digits>/rank_tp0_pp0_dp0.json`.

    The digits are of a SHA-256 over model, dtype, quantization, backend, the sizes of all four kinds of parallelism and
    the name of the configuration's class, so two configurations never meet; the name has the tensor, pipeline and data
    parallel rank, so two ranks never share one. Experts are split within those ranks: ep's size counts, its rank does
    not. Records lie in the folder of this name without `.json`. Ranks that compute the same may just as well share one
    folder: records hold no rank.

    tp, pp, dp, ep: (rank, size). root: `flashloom/autotune` in the user's cache folder unless given. Raises TypeError
    and ValueError for a rank outside its size.
    """
    sizes = {}
    for name, place in (("tp", tp), ("pp", pp), ("dp", dp), ("ep", ep)):
        if not (isinstance(place, tuple) and len(place) == 2 and all(type(n) is int for n in place)):
            raise TypeError(f"{name}={place!r}: give (rank, size), two ints")
        if not 0 <= place[0] < place[1]:
            raise ValueError(f"{name}={place}: the rank must be from 0 to size - 1")
        sizes[name] = place[1]
    named = {
        "model": str(model),
        "dtype": str(dtype).removeprefix("torch."),
        "quantization": quantization,
        "backend": backend,
        **sizes,
        "config": config if isinstance(config, str) else f"{config.__module__}.{config.__qualname__}",
    }
    digits = hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:16]
    if root is None:
        root = settings.get().cache_dir or Path(platformdirs.user_cache_dir("flashloom", appauthor=False))
        root = Path(root) / "autotune"
    name = f"rank_tp{tp[0]}_pp{pp[0]}_dp{dp[0]}.json"
    return Path(root).expanduser() / _version() / _architecture() / digits / name


def _version() -> str:
    try:
        return metadata.version("flashloom")
    except metadata.PackageNotFoundError:
        return "source"


def _architecture() -> str:
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        return f"sm{major}{minor}"
    return Target.here().name
