"""`python -m flashloom.compat script.py args...` or `-m module args...`: a program whose flashinfer is flashloom."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from pathlib import Path

from flashloom.compat import install

USAGE = """usage: python -m flashloom.compat script.py [argument ...]
       python -m flashloom.compat -m module [argument ...]"""


def main() -> None:
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help") or arguments == ["-m"]:
        print(USAGE)
        raise SystemExit(0 if arguments[:1] in (["-h"], ["--help"]) else 2)
    install()
    if arguments[0] == "-m":
        name, sys.argv = arguments[1], arguments[1:]
        sys.path.insert(0, str(Path.cwd()))
        if not _found(name):
            raise SystemExit(f"no module {name!r} on the path: give one that `python -m {name}` would run")
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        script, sys.argv = Path(arguments[0]), arguments
        try:
            (script / "__main__.py" if script.is_dir() else script).open("rb").close()
        except OSError as error:
            raise SystemExit(
                f"{error.filename} cannot be read ({error.strerror}): give the path of a Python program, or -m and a "
                "module's name"
            ) from None
        sys.path.insert(0, str(script.resolve().parent))
        runpy.run_path(arguments[0], run_name="__main__")


def _found(module: str) -> bool:
    """Whether a module is there to be run; packages above it are imported, and what those raise is raised."""
    try:
        return not module.startswith(".") and importlib.util.find_spec(module) is not None
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module}.".startswith(f"{error.name}."):
            return False
        raise


if __name__ == "__main__":
    main()
