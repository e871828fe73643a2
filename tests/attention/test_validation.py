"""Every kind of bad input is refused before a kernel starts, by a sentence with the value, the rule and the fix."""

from __future__ import annotations

import math

import pytest
import torch

import flashloom as fl

HEADS = fl.HeadShape(4, 2, 16, 8)
NAN = math.nan


class Poisoned:
    """Fails the test if a kernel is reached."""

    name, workspace_size = "poisoned", 0

    def run(self, *args, **kwargs):
        pytest.fail("a kernel was started")

    update = run


def plan(q_lens=(3, 1), kv_lens=(7, 4), table=None, **options):
    kv = fl.RaggedKV(list(kv_lens)) if table is None else table
    options = {"variant": fl.causal, "dtype": torch.float32, "device": "cpu"} | options
    made = fl.Attention(HEADS, **options).plan(fl.Batch(q_lens=list(q_lens), kv=kv))
    made._executor = Poisoned()
    return made


def tensors(dtype=torch.float32):
    return (
        torch.zeros(4, 4, 16, dtype=dtype),
        torch.zeros(11, 2, 16, dtype=dtype),
        torch.zeros(11, 2, 8, dtype=dtype),
    )


Q, K, V = tensors()
CACHE = fl.PagedKVCache(1, 6, 4, HEADS, torch.float32, "cpu")


def table(rows=((0, 1), (5, 2)), lens=(7, 4)):
    return fl.PageTable.from_block_table([list(r) for r in rows], list(lens), page_size=4)


def inner_stride_two(x):
    return torch.cat([x, x], -1)[..., ::2]


RUN = {
    "q is not a tensor": (lambda p: p.run([1.0], (K, V)), TypeError, "q is list.*give a tensor"),
    "q dtype": (lambda p: p.run(Q.half(), (K, V)), TypeError, r"q has dtype torch.float16.*torch.float32.*convert"),
    "q rank": (lambda p: p.run(Q[0], (K, V)), ValueError, r"q has shape \(4, 16\): must be \[tokens, q_heads, dim\]"),
    "q heads": (lambda p: p.run(Q[:, :3], (K, V)), ValueError, r"q has shape \(4, 3, 16\).*\[tokens, 4, 16\]"),
    "q dim": (lambda p: p.run(Q[..., :8], (K, V)), ValueError, r"q has shape \(4, 4, 8\)"),
    "q too short": (lambda p: p.run(Q[:3], (K, V)), ValueError, "q has 3 tokens but the batch has 4.*update"),
    "q inner stride": (lambda p: p.run(inner_stride_two(Q), (K, V)), ValueError, r"q has inner stride 2.*contiguous"),
    "q device": (lambda p: p.run(Q.to("meta"), (K, V)), ValueError, "q is on meta.*cpu.*move"),
    "kv is a tensor": (lambda p: p.run(Q, K), TypeError, r"kv is Tensor: give cache\[i\]"),
    "kv of three": (lambda p: p.run(Q, (K, V, None)), ValueError, "kv has 3 parts"),
    "k is not a tensor": (lambda p: p.run(Q, (1, V)), TypeError, "k is int"),
    "k dtype": (lambda p: p.run(Q, (K.double(), V)), TypeError, "k has dtype torch.float64"),
    "v dtype": (lambda p: p.run(Q, (K, V.bfloat16())), TypeError, "v has dtype torch.bfloat16"),
    "k rank": (lambda p: p.run(Q, (K[None], V)), ValueError, r"k has shape \(1, 11, 2, 16\): must be \[tokens"),
    "k heads": (lambda p: p.run(Q, (K[:, :1], V)), ValueError, r"k is \[11, 1, 16\].*\[tokens, 2, 16\]"),
    "v dim": (lambda p: p.run(Q, (K, K)), ValueError, r"v is \[11, 2, 16\].*\[tokens, 2, 8\]"),
    "k too short": (lambda p: p.run(Q, (K[:10], V[:10])), ValueError, "11 tokens but the keys 10 rows"),
    "v shorter than k": (lambda p: p.run(Q, (K, V[:10])), ValueError, "k has 11 tokens and v 10"),
    "k inner stride": (lambda p: p.run(Q, (inner_stride_two(K), V)), ValueError, "k has inner stride 2"),
    "v inner stride": (lambda p: p.run(Q, (K, inner_stride_two(V))), ValueError, "v has inner stride 2"),
    "v device": (lambda p: p.run(Q, (K, V.to("meta"))), ValueError, "v is on meta"),
    "scale dtype": (lambda p: p.run(Q, (K, V, torch.ones(1).half(), None)), TypeError, "k_scale has dtype.*float32"),
    "scale shape": (lambda p: p.run(Q, (K, V, None, torch.ones(3))), ValueError, r"v_scale has shape \(3,\)"),
    "scale type": (lambda p: p.run(Q, (K, V, 1.0, 1.0)), TypeError, "k_scale is float.*float32 tensor"),
    "scale per page of ragged": (lambda p: p.run(Q, (K, V, torch.ones(11, 2), None)), ValueError, "no pages"),
    "scale NaN": (
        lambda p: p.run(Q, (K, V, torch.tensor([1.0, NAN]), None)),
        ValueError,
        r"k_scale\[1\] = nan.*finite",
    ),
    "scale zero": (lambda p: p.run(Q, (K, V, None, torch.zeros(1))), ValueError, r"v_scale\[0\] = 0.0.*positive"),
    "out dtype": (lambda p: p.run(Q, (K, V), out=torch.empty(4, 4, 8).int()), TypeError, "out.dtype=torch.int32"),
    "out shape": (lambda p: p.run(Q, (K, V), out=torch.empty(4, 4, 16)), ValueError, r"out has shape \(4, 4, 16\)"),
    "out rows": (lambda p: p.run(Q, (K, V), out=torch.empty(3, 4, 8)), ValueError, "one row per row of q"),
    "out inner stride": (
        lambda p: p.run(Q, (K, V), out=torch.empty(4, 4, 16)[..., ::2]),
        ValueError,
        "out has inner stride 2",
    ),
    "out is not a tensor": (lambda p: p.run(Q, (K, V), out=3), TypeError, "out is int"),
    "out device": (lambda p: p.run(Q, (K, V), out=torch.empty(4, 4, 8, device="meta")), ValueError, "out is on meta"),
    "lse dtype": (lambda p: p.run(Q, (K, V), lse=torch.empty(4, 4).half()), TypeError, "lse has dtype torch.float16"),
    "lse shape": (lambda p: p.run(Q, (K, V), lse=torch.empty(4, 2)), ValueError, r"lse has shape \(4, 2\)"),
    "lse is not a tensor": (lambda p: p.run(Q, (K, V), lse=3), TypeError, "lse is int"),
    "variant": (lambda p: p.run(Q, (K, V), variant=3), TypeError, "variant is int"),
    "another variant": (lambda p: p.run(Q, (K, V), variant=fl.softcap(3.0)), ValueError, "another expression"),
}


@pytest.mark.parametrize("case", RUN)
def test_run(case):
    call, error, message = RUN[case]
    with pytest.raises(error, match=message):
        call(plan())


PAGED = {
    "page size": (
        lambda p: p.run(Q, (torch.zeros(6, 8, 2, 16), torch.zeros(6, 8, 2, 8))),
        r"k is \[6, 8, 2, 16\].*4, 2",
    ),
    "layout": (
        lambda p: p.run(Q, (torch.zeros(6, 2, 4, 16), torch.zeros(6, 2, 4, 8))),
        r"k is \[6, 2, 4, 16\].*check the heads, the page size and layout=",
    ),
    "page number": (
        lambda p: p.run(Q, (torch.zeros(5, 4, 2, 16), torch.zeros(5, 4, 2, 8))),
        "request 1's page table entry 0 is page 5: the cache has 5 pages",
    ),
    "rank": (lambda p: p.run(Q, (K, V)), r"k has shape \(11, 2, 16\): must be \[pages, page_size, kv_heads, dim\]"),
}


@pytest.mark.parametrize("case", PAGED)
def test_run_over_pages(case):
    call, message = PAGED[case]
    with pytest.raises(ValueError, match=message):
        call(plan(table=table()))


def test_page_numbers_are_checked_again_after_update():
    p = plan(table=table())
    p._executor.run = p._executor.update = lambda *args, **kwargs: None
    p.run(Q, CACHE[0])
    p.update(fl.Batch(q_lens=[3, 1], kv=table(rows=((0, 1), (6, 2)))))
    with pytest.raises(ValueError, match="page 6: the cache has 6 pages"):
        p.run(Q, CACHE[0])
    p.update(fl.Batch(q_lens=[3, 3], kv=table()))
    with pytest.raises(ValueError, match="q has 4 tokens but the batch has 6"):
        p.run(Q, CACHE[0])


MAKE = {
    "head counts that do not divide": (lambda: fl.HeadShape(6, 4, 16), ValueError, "q_heads=6, kv_heads=4.*multiple"),
    "no heads": (lambda: fl.HeadShape(0, 1, 16), ValueError, "q_heads=0: must be at least 1"),
    "float heads": (lambda: fl.HeadShape(4.0, 2, 16), TypeError, "q_heads=4.0 is not an int"),
    "bool dim": (lambda: fl.HeadShape(4, 2, True), TypeError, "dim=True"),
    "mla latent": (lambda: fl.HeadShape.mla(4, 0, 16), ValueError, "latent=0"),
    "mla rope": (lambda: fl.HeadShape.mla(4, 16, -1), ValueError, "rope=-1"),
    "heads": (lambda: fl.Attention(4, dtype=torch.float32), TypeError, "heads is int.*HeadShape"),
    "dtype": (lambda: fl.Attention(HEADS, dtype=torch.int32), TypeError, "dtype=torch.int32: must be one of float32"),
    "dtype by name": (lambda: fl.Attention(HEADS, dtype="float32"), TypeError, "dtype='float32' is not a torch.dtype"),
    "kv_dtype": (
        lambda: fl.Attention(HEADS, dtype=torch.float32, kv_dtype=torch.float64),
        TypeError,
        "kv_dtype=torch.float64",
    ),
    "layout": (lambda: fl.Attention(HEADS, dtype=torch.float32, layout="HDN"), ValueError, "layout='HDN'.*NHD.*HND"),
    "sm_scale NaN": (
        lambda: fl.Attention(HEADS, dtype=torch.float32, sm_scale=NAN),
        ValueError,
        "sm_scale=nan.*finite",
    ),
    "sm_scale text": (lambda: fl.Attention(HEADS, dtype=torch.float32, sm_scale="1"), TypeError, "sm_scale='1'"),
    "variant": (lambda: fl.Attention(HEADS, dtype=torch.float32, variant="causal"), TypeError, "variant is str"),
    "per-head field": (
        lambda: fl.Attention(HEADS, dtype=torch.float32, device="cpu", variant=fl.sink(torch.zeros(2))),
        ValueError,
        "sinks has 2 entries.*q_heads = 4",
    ),
    "field device": (
        lambda: fl.Attention(HEADS, dtype=torch.float32, device="cpu", variant=fl.sink(torch.zeros(4, device="meta"))),
        ValueError,
        "sinks is on meta",
    ),
    "per-request field": (
        lambda: plan(variant=fl.prefix_lm(torch.tensor([1]))),
        ValueError,
        "prefix_lens has 1.*2 requests",
    ),
    "per-key field": (
        lambda: plan(variant=fl.document_mask(torch.zeros(10, dtype=torch.int32))),
        ValueError,
        "documents has 10 entries.*11 key tokens",
    ),
    "plan takes a batch": (
        lambda: fl.Attention(HEADS, dtype=torch.float32, device="cpu").plan([1]),
        TypeError,
        "Batch",
    ),
    "reserve type": (
        lambda: fl.Attention(HEADS, dtype=torch.float32, device="cpu").plan(fl.Batch.decode(table()), reserve=3),
        TypeError,
        "reserve is int",
    ),
    "reserve too small": (
        lambda: fl.Attention(HEADS, dtype=torch.float32, device="cpu").plan(
            fl.Batch.decode(table()), reserve=fl.Reserve(requests=1)
        ),
        ValueError,
        "2 requests but the plan reserves 1",
    ),
    "reserve negative": (lambda: fl.Reserve(pages=-1), ValueError, "pages=-1"),
    "reserve float": (lambda: fl.Reserve(tokens=1.5), TypeError, "tokens=1.5"),
    "no q lengths": (lambda: fl.Batch(kv=table()), ValueError, "exactly one"),
    "both q lengths": (lambda: fl.Batch([1, 1], q_indptr=[0, 1, 2], kv=table()), ValueError, "exactly one"),
    "q lengths of another batch": (lambda: fl.Batch([1], kv=table()), ValueError, "1 query lengths.*2 requests"),
    "negative q length": (lambda: fl.Batch([1, -1], kv=table()), ValueError, r"q_lens\[1\] = -1.*negative"),
    "float q length": (lambda: fl.Batch([1, 1.5], kv=table()), TypeError, "q_lens holds float64"),
    "int16 q lengths": (lambda: fl.Batch(torch.ones(2).short(), kv=table()), TypeError, "q_lens has dtype torch.int16"),
    "2-D q lengths": (lambda: fl.Batch(torch.ones(2, 1).int(), kv=table()), ValueError, "q_lens has shape"),
    "q lengths beyond 32 bits": (lambda: fl.Batch([2**31, 1], kv=table()), ValueError, "2147483648.*32 bits"),
    "q lengths that sum beyond 32 bits": (lambda: fl.Batch([2**30, 2**30], kv=table()), ValueError, "sums to"),
    "descending q_indptr": (lambda: fl.Batch(q_indptr=[0, 3, 2], kv=table()), ValueError, "must not decrease"),
    "q_indptr start": (lambda: fl.Batch(q_indptr=[1, 3, 4], kv=table()), ValueError, r"q_indptr\[0\] = 1.*start at 0"),
    "empty q_indptr": (lambda: fl.Batch(q_indptr=[], kv=table()), ValueError, "q_indptr is empty"),
    "max_q_len too small": (
        lambda: fl.Batch([3, 1], kv=table(), max_q_len=2),
        ValueError,
        "max_q_len=2.*3 query tokens",
    ),
    "max_q_len type": (lambda: fl.Batch([3, 1], kv=table(), max_q_len=3.0), TypeError, "max_q_len=3.0"),
    "tokens": (lambda: fl.Batch([3, 1], kv=table(), tokens=5), ValueError, "tokens=5 but the query lengths sum to 4"),
    "batch kv": (lambda: fl.Batch([1], kv=[4]), TypeError, "kv is list.*PageTable"),
    "decode kv": (lambda: fl.Batch.decode([4]), TypeError, "not list"),
    "negative length": (lambda: table(lens=(7, -4)), ValueError, r"seq_lens\[1\] = -4.*negative"),
    "table too short": (lambda: table(lens=(7, 9)), ValueError, "request 1 has 9 tokens but 2 pages of 4.*shorter"),
    "negative page": (lambda: table(rows=((0, 1), (-1, 2))), ValueError, "request 1's page table entry 0 is page -1"),
    "page size 0": (lambda: fl.PageTable.from_block_table([[0]], [1], page_size=0), ValueError, "page_size=0"),
    "page size float": (lambda: fl.PageTable.from_block_table([[0]], [1], page_size=4.0), TypeError, "page_size=4.0"),
    "table rows": (
        lambda: fl.PageTable.from_block_table([[0]], [1, 1], page_size=4),
        ValueError,
        "1 rows and seq_lens 2",
    ),
    "1-D table": (lambda: fl.PageTable.from_block_table([0], [1], page_size=4), ValueError, "block_table has shape"),
    "table not rectangular": (
        lambda: fl.PageTable.from_block_table([[0], [1, 2]], [1, 1], page_size=4),
        TypeError,
        "block_table is not rectangular",
    ),
    "float table": (lambda: fl.PageTable.from_block_table(torch.zeros(1, 1), [1], page_size=4), TypeError, "float32"),
    "csr lengths": (lambda: fl.PageTable.from_csr([0, 1], [0], [1, 1], page_size=4), ValueError, "one more"),
    "csr last page too long": (
        lambda: fl.PageTable.from_csr([0, 1], [0], [5], page_size=4),
        ValueError,
        r"last_page_len\[0\] = 5",
    ),
    "csr last page empty": (
        lambda: fl.PageTable.from_csr([0, 1], [0], [0], page_size=4),
        ValueError,
        r"last_page_len\[0\] = 0",
    ),
    "csr tokens without pages": (lambda: fl.PageTable.from_csr([0, 0], [], [1], page_size=4), ValueError, "0 pages"),
    "csr indices too short": (lambda: fl.PageTable.from_csr([0, 3], [0, 1], [1], page_size=4), ValueError, "shorter"),
    "csr negative page": (lambda: fl.PageTable.from_csr([0, 2], [0, -3], [1], page_size=4), ValueError, "page -3"),
    "ragged lengths": (lambda: fl.RaggedKV([1, -2]), ValueError, "negative"),
    "ragged of nothing": (lambda: fl.RaggedKV(), ValueError, "exactly one"),
    "ragged too long": (lambda: fl.RaggedKV([2**30 + 1]), ValueError, "use pages"),
    "dense lengths": (lambda: fl.DenseKV(2, 8, [3, 9]), ValueError, r"lens\[1\] = 9, but a row has 8 tokens"),
    "dense count": (lambda: fl.DenseKV(2, 8, [3]), ValueError, "1 entries for 2 requests"),
    "dense tokens": (lambda: fl.DenseKV(2, -1), ValueError, "tokens=-1"),
    "cache dtype": (lambda: fl.PagedKVCache(1, 1, 1, HEADS, torch.float64), TypeError, "dtype=torch.float64"),
    "cache layout": (lambda: fl.PagedKVCache(1, 1, 1, HEADS, torch.float32, layout="NDH"), ValueError, "layout='NDH'"),
    "cache pages": (lambda: fl.PagedKVCache(1, 0, 1, HEADS, torch.float32), ValueError, "pages=0"),
    "cache scale NaN": (
        lambda: fl.PagedKVCache(1, 1, 1, HEADS, torch.int8, "cpu", k_scale=NAN),
        ValueError,
        "k_scale=nan",
    ),
    "cache scale tensor NaN": (
        lambda: fl.PagedKVCache(1, 1, 1, HEADS, torch.int8, "cpu", v_scale=torch.tensor([NAN])),
        ValueError,
        r"v_scale\[0\] = nan",
    ),
    "cache scale negative": (
        lambda: fl.PagedKVCache(1, 1, 1, HEADS, torch.int8, "cpu", k_scale=-1.0),
        ValueError,
        "positive",
    ),
    "cache scale shape": (
        lambda: fl.PagedKVCache(1, 5, 1, HEADS, torch.int8, "cpu", k_scale=torch.ones(2, 5)),
        ValueError,
        r"k_scale has shape \(2, 5\).*\[5, 2\]",
    ),
    "dense attention ranks": (lambda: fl.attention(Q, K[None], V[None]), ValueError, "k has shape.*all three"),
    "dense attention type": (lambda: fl.attention(Q, K, None), TypeError, "v is NoneType"),
    "dense attention heads": (lambda: fl.attention(Q, K[:, :1], V), ValueError, "same heads and tokens"),
    "dense attention group": (lambda: fl.attention(Q[:, :3], K, V), ValueError, "multiple"),
    "dense attention dim": (lambda: fl.attention(Q[..., :8], K, V), ValueError, r"\(4, 4, 8\).*\(11, 2, 16\).*dim"),
    "dense attention batches": (
        lambda: fl.attention(torch.zeros(2, 4, 1, 16), torch.zeros(3, 2, 5, 16), torch.zeros(3, 2, 5, 16)),
        ValueError,
        "2, 3 and 3 batches",
    ),
    "dense attention dtype": (lambda: fl.attention(Q.int(), K, V), TypeError, "dtype=torch.int32"),
    "merge shape": (lambda: fl.merge(Q, Q[..., 0], Q[:2], Q[:2, :, 0]), ValueError, "out_b has shape"),
    "merge lse shape": (lambda: fl.merge(Q, Q[..., 0], Q, Q[:, :2, 0]), ValueError, "lse_b has shape"),
    "merge without lse": (lambda: fl.merge(Q, None, Q, Q[..., 0]), ValueError, "both lse"),
    "merge type": (lambda: fl.merge(Q, Q[..., 0], None, Q[..., 0]), TypeError, "out_b is NoneType"),
    "merge dtype": (lambda: fl.merge(Q.int(), Q[..., 0], Q, Q[..., 0]), TypeError, "out_a has dtype torch.int32"),
    "block-sparse kv": (
        lambda: fl.BlockSparseKV([7], [0, 1], [0], block_q=4, block_kv=4),
        TypeError,
        "BlockSparseKV kv is list",
    ),
    "block-sparse count": (
        lambda: fl.Batch([5], kv=fl.BlockSparseKV(fl.RaggedKV([8]), [0, 1], [0], block_q=4, block_kv=4)),
        ValueError,
        "1 query blocks but the batch has 2",
    ),
    "block-sparse index": (
        lambda: fl.Batch([4], kv=fl.BlockSparseKV(fl.RaggedKV([8]), [0, 2], [0, 2], block_q=4, block_kv=4)),
        ValueError,
        r"indices\[1\] = 2.*0 to 1",
    ),
    "block-sparse indices too short": (
        lambda: fl.BlockSparseKV(fl.RaggedKV([8]), [0, 2], [0], block_q=4, block_kv=4),
        ValueError,
        "ends at 2 but there are 1",
    ),
}


@pytest.mark.parametrize("case", MAKE)
def test_making(case):
    call, error, message = MAKE[case]
    with pytest.raises(error, match=message):
        call()


K4, V4 = torch.zeros(4, 2, 16), torch.zeros(4, 2, 8)
SLOTS = torch.arange(4)
APPEND = {
    "cache": (
        lambda: fl.append(CACHE, K4, V4, SLOTS),
        TypeError,
        r"PagedKVCache: give one layer of a cache, cache\[i\]",
    ),
    "k type": (lambda: fl.append(CACHE[0], None, V4, SLOTS), TypeError, "k is NoneType"),
    "v missing": (lambda: fl.append(CACHE[0], K4, None, SLOTS), TypeError, "only a latent cache"),
    "k dtype": (lambda: fl.append(CACHE[0], K4.int(), V4, SLOTS), TypeError, "k has dtype torch.int32"),
    "k shape": (lambda: fl.append(CACHE[0], V4, V4, SLOTS), ValueError, r"k has shape \(4, 2, 8\)"),
    "v tokens": (lambda: fl.append(CACHE[0], K4, V4[:3], SLOTS), ValueError, "k has 4 tokens and v 3"),
    "k device": (lambda: fl.append(CACHE[0], K4.to("meta"), V4, SLOTS), ValueError, "k is on meta"),
    "slots type": (lambda: fl.append(CACHE[0], K4, V4, [0, 1, 2, 3]), TypeError, r"slots is list.*batch.slots\(\)"),
    "slots dtype": (lambda: fl.append(CACHE[0], K4, V4, SLOTS.int()), TypeError, "slots has dtype torch.int32"),
    "slots count": (lambda: fl.append(CACHE[0], K4, V4, SLOTS[:3]), ValueError, r"slots has shape \(3,\)"),
    "slots too large": (lambda: fl.append(CACHE[0], K4, V4, SLOTS + 21), ValueError, "slots holds 24: must be 0 to 23"),
    "slots negative": (lambda: fl.append(CACHE[0], K4, V4, SLOTS - 2), ValueError, "slots holds -2"),
    "slots device": (lambda: fl.append(CACHE[0], K4, V4, SLOTS.to("meta")), ValueError, "slots is on meta"),
    "gradient": (
        lambda: fl.append(CACHE[0], K4.clone().requires_grad_(), V4, SLOTS),
        RuntimeError,
        r"torch\.no_grad\(\)",
    ),
}


@pytest.mark.parametrize("case", APPEND)
def test_append(case):
    call, error, message = APPEND[case]
    before = CACHE[0].k.clone()
    with pytest.raises(error, match=message):
        call()
    assert torch.equal(CACHE[0].k, before)
