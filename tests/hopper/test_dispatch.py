"""Which batches the Hopper kernel takes, and of which it splits keys: arithmetic, without a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import flashloom as fl
from flashloom import dispatch
from flashloom.attention.executor import AttentionSpec
from flashloom.target import Target

pytest.importorskip("triton", reason="Triton is not installed")

from flashloom.attention.hopper_executor import HopperExecutor
from flashloom.attention.kernels.hopper import asked, config

BF16, H = torch.bfloat16, fl.HeadShape
G, M, FIVE = H(32, 8, 128), H(16, 16, 128), H(40, 8, 128)
PROGRAMS = 132  # of an H200


def spec_of(heads, invariant=False):
    program = fl.causal.program.specialise(heads.dim, heads.value_dim)
    return AttentionSpec(heads, program, BF16, BF16, batch_invariant=invariant)


def takes(heads, q, kv, requests, page=0, invariant=False):
    kv_of = fl.RaggedKV([kv] * requests)
    if page:
        pages = -(-kv // page)
        starts, order = np.arange(requests + 1) * pages, np.arange(requests * pages)
        kv_of = fl.PageTable.from_csr(starts, order, [(kv - 1) % page + 1] * requests, page_size=page)
    return HopperExecutor.declines(spec_of(heads, invariant), fl.Batch([q] * requests, kv=kv_of)) is None


def cut(heads, q_lens, kv_lens, page=0):
    spec = spec_of(heads)
    chosen = asked.choose(spec, -(-sum(q_lens) // len(q_lens)), page)
    groups = heads.q_heads // chosen.pack
    return config.cuts(np.array(q_lens, np.int32), np.array(kv_lens, np.int32), chosen, groups, PROGRAMS)


@pytest.mark.parametrize("page", [0, 1, 16])
def test_append_is_the_hopper_kernels(page):
    """Every q, kv and batch at which it was the faster of the two when all three were measured."""
    for q in (16, 32, 64, 128, 256, 512):
        for kv in (4096, 32768, 131072):
            assert all(takes(G, q, kv, requests, page) for requests in (1, 2, 4))
    assert takes(M, 16, 4096, 1, page)
    assert takes(H(64, 8, 128), 8, 4096, 1, page)


def test_decode_is_the_triton_kernels():
    for q, heads in ((1, G), (4, G), (1, M), (2, H(64, 8, 128)), (1, H(128, 8, 128))):
        assert not takes(heads, q, 8192, 4)
    assert not takes(FIVE, 24, 65536, 4)  # five heads share keys and no tile: each would read them anew
    assert takes(FIVE, 64, 16384, 2)


def test_batch_invariant_plans_are_one_kernels():
    """Their choice may not depend on the batch."""
    for q, requests in ((1, 64), (100, 1), (2000, 8)):
        assert not takes(G, q, 4096, requests, 16, invariant=True)
    assert not HopperExecutor.kernels(spec_of(G, invariant=True), Target("sm90"), 2048, 500, 16)


def test_which_keys_are_split():
    """Few tiles on long keys, one long request among short ones, and one and a half walks for each program; not what
    fills the GPU anyway, and no keys of which a range would be a few tiles."""
    assert cut(G, [128], [32768], 16)
    assert cut(G, [16], [4096], 1)
    assert cut(G, [64] * 2, [8192] * 2)
    assert cut(G, [128] * 16, [131072] + [1024] * 15)
    assert cut(G, [128] * 5, [32768] * 5)
    assert cut(FIVE, [200] * 2, [16384] * 2)
    assert not cut(G, [128] * 4, [32768] * 4)  # 128 tiles
    assert not cut(G, [512], [131072])
    assert not cut(G, [4096] * 4, [4096] * 4)
    assert not cut(G, [128], [512])
    assert not cut(G, [8192] + [1] * 32, [8192] * 33)


def test_prepared_kernels_are_those_of_either_plan():
    """A pack cannot know whether keys will be split: it holds the planner and the kernel for both."""
    spec, target = spec_of(G), Target("sm90")
    for mean, page in ((64, 16), (500, 0), (8, 1)):
        chosen = asked.choose(spec, mean, page)
        want = []
        for split in (False, True):
            want.append(asked.plan_kernel(spec, chosen, page > 0, target, split))
            want.append(asked.attend_kernel(spec, asked.usual(spec, chosen, page, split), chosen, page, target))
        found = [kernel.fields for kernel in dispatch.kernels(spec, target, mean, mean, page)]
        assert all(kernel.fields in found for kernel in want)
        assert len({str(kernel.fields) for kernel in want}) == 4
