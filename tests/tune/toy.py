"""A small operator for the tuner: the sum of a vector, computed with more or less work, rightly or not."""

import os
import signal
from dataclasses import asdict, dataclass

import torch

from flashloom.records import Question, bucket_of
from flashloom.tune.measure import Timer

OFFERED = ("plain", "fast", "faster", "slow", "wrong", "raises", "memory", "kills", "flaky")
COST_US = {"plain": 200, "fast": 120, "faster": 60, "slow": 400, "flaky": 10}


@dataclass(frozen=True)
class Way:
    """How to sum."""

    name: str

    def to_json(self):
        return asdict(self)


def read(found):
    if found.get("name") not in OFFERED or set(found) != {"name"}:
        raise ValueError(f"{found} is no way to sum")
    return Way(**found)


class CostTimer(Timer):
    """Runs calls and believes what they say they cost, so that a busy machine changes no winner."""

    def repeats(self, call):
        return 1

    def sample(self, call, repeats):
        call()
        return call.seconds


class Inputs:
    def __init__(self, n):
        self.x = torch.arange(n, dtype=torch.float64)
        self.out = torch.empty(1, dtype=torch.float64)


class Sum:
    """fields: part of its key. log: a file to which each run of a way is appended."""

    device = torch.device("cpu")

    def __init__(self, ways=("fast", "slow"), kernel="1", log=None, cost=None):
        self.ways, self.kernel, self.log, self.cost = ways, kernel, log, {**COST_US, **(cost or {})}
        self._question = None

    def __reduce__(self):
        return Sum, (self.ways, self.kernel, self.log, self.cost)

    def question(self, n):
        if self._question is None:
            self._question = Question("sum", {"kernel": self.kernel}, {"compiler": "none"}, ("n",), read, "toy")
        return self._question, bucket_of((n,))

    def describe(self, n):
        return f"{n} numbers"

    def default(self, n):
        return Way("plain")

    def candidates(self, n, default):
        return [Way(name) for name in self.ways]

    def valid(self, config, n):
        return not (config.name == "slow" and n > 1000)

    def dangerous(self, config):
        return config.name == "kills"

    def prepare(self, configs, n):
        pass

    def inputs(self, n):
        return Inputs(n)

    def run(self, config, n, inputs):
        calls = 0

        def call():
            nonlocal calls
            calls += 1
            if config.name == "raises":
                raise RuntimeError("no such instruction")
            if config.name == "memory":
                raise MemoryError("too large")
            if config.name == "kills":
                os.kill(os.getpid(), signal.SIGSEGV)
            inputs.out[0] = inputs.x.sum() + (config.name == "wrong") + (config.name == "flaky" and calls > 5)

        call.seconds = self.cost.get(config.name, 50) * 1e-6
        if self.log:
            with open(self.log, "a") as file:
                file.write(f"{config.name} {n}\n")
        return call

    def check(self, n, inputs):
        wanted = n * (n - 1) / 2
        return None if float(inputs.out) == wanted else f"{float(inputs.out)} is not {wanted}"
