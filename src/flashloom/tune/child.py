"""The process in which dangerous candidates are tried: takes a job from stdin, says a line of JSON for each of them."""

from __future__ import annotations

import json
import os
import pickle
import sys
from typing import Any

__all__: list[str] = []


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what candidates print must not be taken for answers
    job, configs, prepare, path = pickle.load(sys.stdin.buffer)
    sys.path[:] = path

    def say(**what: Any) -> None:
        answers.write(json.dumps(what) + "\n")

    try:
        operator, cases = pickle.loads(job)
    except Exception as error:
        say(error=f"the operator cannot be made in a child process: {type(error).__name__}: {error}")
        return
    from flashloom.tune.trial import Lost, spoil, try_here

    if prepare:
        operator.prepare(configs, cases[0])
    together = [(case, operator.inputs(case)) for case in cases]
    for case, inputs in together:  # by the default's results all others are judged
        call = operator.run(operator.default(case), case, inputs)
        spoil(inputs)
        call()
        operator.check(case, inputs)
    for config in configs:
        try:
            status, note, _ = try_here(operator, config, together)
        except Lost:
            answers.flush()
            os._exit(70)
        say(status=status, note=note)


if __name__ == "__main__":
    main()
