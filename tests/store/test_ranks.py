"""Ranks of one job, started by torchrun and joined by gloo: they ask for the same kernels, by the same keys, and build
each once between them.
"""

import os
import subprocess
import sys
from pathlib import Path

import flashloom as fl

RANK = """
import time, torch
import torch.distributed as dist
import flashloom as fl
from flashloom import dispatch, store
from flashloom.target import Target

dist.init_process_group("gloo")
rank, builds = dist.get_rank(), []

def build(folder):
    time.sleep(0.2)
    (folder / "kernel.so").write_bytes(b"kernel")
    builds.append(1)

variant = fl.causal & fl.softcap(30.0)
attention = fl.Attention(fl.HeadShape(8, 2, 64), variant=variant, dtype=torch.bfloat16, device="cpu")
keys = []
for target in ("sm90", "x86"):
    keys += [store.digest(kernel.fields) for kernel in dispatch.kernels(attention.spec, Target(target), 1, 1, 16)]
dist.barrier()
start = time.monotonic()
for i in range(8):
    store.get_or_build({"kind": "test", "number": (i + 3 * rank) % 8}, build, label=f"kernel {i}")
seconds = time.monotonic() - start
found = [None] * dist.get_world_size()
dist.all_gather_object(found, (keys, len(builds), seconds))
assert all(one[0] == keys for one in found), "ranks ask for different kernels"
assert sum(one[1] for one in found) == 8, found
assert max(one[2] for one in found) < 300, found
if rank == 0:
    print("ranks agree on", len(keys), "keys")
dist.destroy_process_group()
"""


def test_ranks_of_torchrun_build_each_kernel_once(tmp_path):
    (tmp_path / "rank.py").write_text(RANK)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4", str(tmp_path / "rank.py")]
    environment = {
        **os.environ,
        "FLASHLOOM_CACHE_DIR": str(tmp_path / "ranks"),
        "FLASHLOOM_WAIT": "900",
        "PYTHONPATH": str(Path(fl.__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=1200, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "ranks agree on" in done.stdout
