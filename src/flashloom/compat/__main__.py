"""`python -m flashloom.compat script.py args...` or `-m module args...`: a program whose flashinfer is flashloom."""

from __future__ import annotations

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
        sys.argv = arguments[1:]
        sys.path.insert(0, str(Path.cwd()))
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main()
