"""Four ranks tune together, over gloo: one result everywhere, each key tuned once, and nobody hangs."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from tests.tune.ranks_main import ALL, DEAD, WORLD
from tests.tune.toy import Sum

import flashloom as fl
from flashloom.records import Folder
from flashloom.tune import ranks as ranks_module
from flashloom.tune.ranks import Ranks

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo")


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What the ranks wrote: scenario -> rank -> dict."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "FLASHLOOM_CACHE_DIR": str(folder / "store")}
    command = [sys.executable, "-m", "tests.tune.ranks_main", str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)

    def read(scenario):
        ranks = {
            rank: json.loads((folder / scenario / str(rank)).read_text())
            for rank in range(WORLD)
            if (folder / scenario / str(rank)).exists()
        }
        assert set(ranks) == set(range(WORLD)) - {DEAD.get(scenario)}, done.stderr[-3000:]
        return ranks

    read.folder = folder
    return read


def tuned_by(ranks):
    """Key -> ranks that ran candidates of it."""
    found = {}
    for rank, said in ranks.items():
        for line in filter(None, said["ran"]):
            name, n = line.split()
            if name != "plain":
                found.setdefault(int(n), set()).add(rank)
    return found


def agree(ranks):
    assert len({said["digest"] for said in ranks.values()}) == 1
    assert len({json.dumps(said["configs"]) for said in ranks.values()}) == 1
    assert all(said["configs"].values() for said in ranks.values())


def test_cold_ranks_share_the_work_and_take_one_result(seen):
    ranks = seen("cold")
    agree(ranks)
    work = tuned_by(ranks)
    assert set(work) == set(ALL)
    assert all(len(by) == 1 for by in work.values()), "each key is tuned once"
    assert len(set.union(*work.values())) >= 2, "not all by one rank"
    assert all(said["again"] == ["known"] * len(ALL) for said in ranks.values())
    for rank in range(WORLD):  # each keeps the answers in a folder of its own: the same bytes
        files = list(Folder(seen.folder / "cold" / f"cache{rank}").files())
        assert len(files) == len(ALL)
    texts = {
        tuple(path.read_bytes() for path in Folder(seen.folder / "cold" / f"cache{rank}").files())
        for rank in range(WORLD)
    }
    assert len(texts) == 1
    assert all(not said["errors"] for said in ranks.values())


def test_warm_and_cold_ranks_agree_without_tuning_what_one_of_them_knows(seen):
    ranks = seen("mixed")
    agree(ranks)
    assert tuned_by(ranks) == {}
    assert {status for said in ranks.values() for status in said["statuses"].values()} <= {"known", "taken"}
    assert all(said["again"] == ["known"] * len(ALL) for said in ranks.values())


def test_ranks_with_other_shapes_agree_on_what_they_have_in_common(seen):
    ranks = seen("shapes")
    assert all(len(by) == 1 for by in tuned_by(ranks).values())
    found = {}
    for said in ranks.values():
        for n, way in said["configs"].items():
            found.setdefault(n, set()).add(way)
    assert all(len(ways) == 1 for ways in found.values())
    assert set(map(int, found)) == set(ALL)
    assert ranks[3]["statuses"] == {}


def test_identical_ranks_may_share_one_folder(seen):
    agree(seen("shared"))
    assert len(list(Folder(seen.folder / "shared" / "cache").files())) == len(ALL)


@pytest.mark.parametrize("scenario", ["killed", "stuck", "absent"])
def test_a_rank_that_is_gone_keeps_nobody_waiting(seen, scenario):
    ranks = seen(scenario)
    agree(ranks)
    assert set(tuned_by(ranks)) == set(ALL)
    assert max(said["seconds"] for said in ranks.values()) < 100, "it was not patience that ended it"
    if scenario == "absent":
        assert all("ranks [3]" in said["errors"][0] for said in ranks.values())


def test_without_the_stores_host_the_default_serves(seen):
    for said in seen("host").values():
        assert said["seconds"] < 100, "it was not patience that ended it"
        assert "store of the process group is gone" in said["errors"][0]
        assert set(said["statuses"].values()) <= {"left", "known", "tuned", "taken"}


def test_a_store_of_ones_own(tmp_path):
    """Threads as ranks, without torch.distributed."""
    board = dist.HashStore()

    def work(rank):
        with fl.autotune(tune=False, cache=tmp_path / str(rank)):
            return fl.tune(Sum(), [100], group=Ranks(store=board, rank=rank, size=2))

    with ThreadPoolExecutor(2) as threads:
        reports = list(threads.map(work, range(2)))
    assert {report.outcomes[0].status for report in reports} == {"tuned", "taken"}
    assert reports[0].digest == reports[1].digest
    assert not [error for report in reports for error in report.errors]


def test_a_machine_that_stood_still_is_no_silence(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(ranks_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    board = ranks_module._Board(Ranks(store=dist.HashStore(), rank=0, size=2, patience=2.0))
    assert board.alive(1)
    for _ in range(3):
        now[0] += 100.0
        assert board.alive(1)
    for _ in range(100):
        now[0] += 0.02
        board.alive(1)
    assert not board.alive(1)


def test_a_group_needs_torch_distributed():
    with pytest.raises(RuntimeError, match="init_process_group"):
        fl.tune(Sum(), [100], group=True)
    with pytest.raises(ValueError, match="rank= and size="):
        fl.tune(Sum(), [100], group=Ranks(store=dist.HashStore()))
    with pytest.raises(ValueError, match="rank 5"):
        fl.tune(Sum(), [100], group=Ranks(store=dist.HashStore(), rank=5, size=2))
