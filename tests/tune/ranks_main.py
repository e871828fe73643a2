"""Four ranks over gloo, for each scenario: `python -m tests.tune.ranks_main FOLDER`. Each rank writes what it saw as
JSON to FOLDER/scenario/rank."""

import json
import os
import signal
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist
from tests.tune.toy import CostTimer, Sum

import flashloom as fl
from flashloom.tune import tuner
from flashloom.tune.ranks import Ranks

WORLD = 4
ALL = [10, 20, 40, 80, 160, 320]  # a key each


#: Silence is measured where somebody dies; elsewhere a machine that is kept from a rank must not be taken for it.
PATIENT = {"patience": 120.0, "dead_after": 120.0, "stuck_after": 120.0}
BRIEF = {**PATIENT, "patience": 6.0, "dead_after": 3.0}
LIMITS = {"killed": BRIEF, "stuck": {**BRIEF, "stuck_after": 3.0}, "absent": {**PATIENT, "patience": 10.0}}


class Meeting(Sum):
    """Each rank stays with the first key that it takes until another rank has taken one, too."""

    met = None

    def inputs(self, n):
        self.met.mkdir(exist_ok=True)
        (self.met / str(os.getpid())).touch()
        await_files(self.met, 2)
        return super().inputs(n)


def await_files(folder, count, seconds=120.0):
    until = time.monotonic() + seconds
    while time.monotonic() < until and len(list(folder.glob("[0-9]*"))) < count:
        time.sleep(0.02)


class Dying(Sum):
    """Ends its process in the middle of its first key, or stops getting on."""

    how = None

    def check(self, n, inputs):
        if self.how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "stuck":
            time.sleep(1000)
        return super().check(n, inputs)


def meet(rank, place):
    """The store of all ranks, which the first one holds, at a port that was free when it took it."""
    if rank == 0:
        board = dist.TCPStore("127.0.0.1", 0, WORLD, True, wait_for_workers=False)
        place.with_suffix(".part").write_text(str(board.port))
        place.with_suffix(".part").rename(place)
        return board
    while not place.exists():
        time.sleep(0.02)
    return dist.TCPStore("127.0.0.1", int(place.read_text()), WORLD, False, wait_for_workers=False)


def rank_main(scenario, rank, folder):
    torch.set_num_threads(1)
    tuner.Timer = CostTimer
    dist.init_process_group("gloo", store=meet(rank, folder / "port"), rank=rank, world_size=WORLD)
    who = Ranks(**LIMITS.get(scenario, PATIENT))
    own = folder / f"cache{rank}"
    log = str(folder / f"log{rank}")
    cases, operator = ALL, Sum(("fast", "slow"), log=log)
    # own timings differ from rank to rank, so that each alone would choose something else
    operator.cost |= {"fast": 60 if rank % 2 else 500, "slow": 500 if rank % 2 else 60}
    if scenario == "mixed":
        warm = {0: ALL, 1: ALL[:2], 2: [], 3: ALL[3:]}[rank]
        if warm:
            with fl.autotune(tune=False, cache=own):
                fl.tune(operator, warm)
        operator.log = log + "-together"
    if scenario == "cold":
        operator = Meeting(("fast", "slow"), log=log, cost=operator.cost)
        operator.met = folder / "met"
    if scenario == "shapes":
        cases = {0: ALL[:4], 1: ALL[2:], 2: ALL[5:], 3: []}[rank]
    if scenario == "shared":
        own = folder / "cache"
    if scenario in ("killed", "stuck") and rank == 2:
        operator = Dying(("fast",), log=log)
        operator.how = scenario
    if scenario == "absent" and rank == 3:
        time.sleep(4)
        os._exit(0)
    if scenario == "host" and rank == 0:
        time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    with fl.autotune(tune=False, cache=own) as session:
        report = fl.tune(operator, cases, group=who)
        seconds = time.monotonic() - start
        configs = {n: session.scope.find(*operator.question(n)) for n in cases}
        again = fl.tune(operator, cases, group=who) if scenario in ("cold", "mixed") else None
    said = {
        "seconds": seconds,
        "digest": report.digest,
        "errors": report.errors,
        "statuses": {o.shapes[0].split()[0]: o.status for o in report.outcomes},
        "configs": {n: None if way is None else way.name for n, way in configs.items()},
        "ran": Path(operator.log).read_text().split("\n") if Path(operator.log).exists() else [],
        "again": None if again is None else [o.status for o in again.outcomes],
    }
    (folder / str(rank)).write_text(json.dumps(said))
    if rank == 0:  # it holds the store: others may still ask
        await_files(folder, 4 - (scenario in DEAD))


DEAD = {"killed": 2, "stuck": 2, "absent": 3, "host": 0}
SCENARIOS = ("cold", "mixed", "shapes", "shared", "killed", "stuck", "absent", "host")


def run(scenario, folder):
    folder.mkdir(parents=True)
    children = {}
    for rank in range(WORLD):
        pid = os.fork()
        if pid == 0:
            try:
                rank_main(scenario, rank, folder)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(0)
        children[pid] = rank
    living = {pid for pid, rank in children.items() if DEAD.get(scenario) != rank}
    until = time.monotonic() + 300
    while living and time.monotonic() < until:
        for pid in list(living):
            if os.waitpid(pid, os.WNOHANG)[0]:
                living.discard(pid)
        time.sleep(0.02)
    for pid in children:
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


if __name__ == "__main__":
    for name in sys.argv[2:] or SCENARIOS:
        run(name, Path(sys.argv[1]) / name)
