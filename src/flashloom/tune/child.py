"""The process in which dangerous candidates are tried: takes a job from stdin, says a line of JSON for each of them."""

from __future__ import annotations

import json
import os
import pickle
import sys
from typing import Any

__all__: list[str] = []

AHEAD = 8  # candidates that are compiled together


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what candidates print must not be taken for answers
    made, tasks, prepare, path = pickle.load(sys.stdin.buffer)
    sys.path[:] = path

    def say(**what: Any) -> None:
        answers.write(json.dumps(what) + "\n")

    try:
        jobs = pickle.loads(made)
    except Exception as error:
        say(error=f"it cannot be made in a child process: {type(error).__name__}: {error}")
        return
    from flashloom.tune.trial import Lost, spoil, try_here

    inputs: dict[int, list[tuple[Any, Any]]] = {}
    for i, (number, config) in enumerate(tasks):
        operator, cases = jobs[number]
        if prepare and i % AHEAD == 0:
            for other in dict.fromkeys(number for number, _ in tasks[i : i + AHEAD]):
                configs = [config for number, config in tasks[i : i + AHEAD] if number == other]
                jobs[other][0].prepare(configs, jobs[other][1][0])
        try:
            if number not in inputs:
                inputs[number] = [(case, operator.inputs(case)) for case in cases]
                for case, own in inputs[number]:  # by the default's results all others are judged
                    call = operator.run(operator.default(case), case, own)
                    spoil(own)
                    call()
                    operator.check(case, own)
            status, note, _ = try_here(operator, config, inputs[number])
        except Lost:
            answers.flush()
            os._exit(70)
        say(status=status, note=note)


if __name__ == "__main__":
    main()
