"""Rows of the Hopper kernel that came out as NaN, once more; see `exact`. It follows that kernel under a mask, and does
nothing where no row was marked."""

import triton
import triton.language as tl
from flashloom.attention.kernels.triton.exact import exact_row

ITEM_WORDS = tl.constexpr(16)
COLUMNS = tl.constexpr(32)  # looked at together


@triton.jit
def mend(
    q, k, v, out, lse, k_scale, v_scale, items, pages, marks, done, q_request, q_token, q_head_step, k_page, k_token,
    k_head, v_page, v_token, v_head, out_request, out_token, out_head, lse_request, lse_token, lse_head, k_scale_head,
    v_scale_head, sm_scale, flags, values,
    QUERY: tl.constexpr, QUERY_INDEX: tl.constexpr, QUERY_LOADS: tl.constexpr, LOGITS: tl.constexpr, MASK: tl.constexpr,
    OUTPUT: tl.constexpr, HEADS: tl.constexpr, PACK: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    PAGE_SIZE: tl.constexpr, ROWS: tl.constexpr, ROOM: tl.constexpr, VEC: tl.constexpr, VEC_OUT: tl.constexpr,
    SCALES: tl.constexpr,
):  # fmt: skip
    """Tensors, strides and flags as in `attend`, items those of the Hopper kernel: ROWS rows (up to ROOM, a power of
    two) of PACK heads, HEADS groups of them. marks int8: not zero where the Hopper kernel met a NaN, zero afterwards;
    done int32, zero before and after. Rows of `out` that hold a NaN are computed once more, under an output transform,
    which may have made something else of it, all rows."""
    if tl.load(marks) == 0:
        return
    local = tl.arange(0, ROOM)
    out_request = out_request.to(tl.int64) * VEC_OUT
    out_token = out_token.to(tl.int64) * VEC_OUT
    out_head = out_head.to(tl.int64) * VEC_OUT
    count = tl.load(items + 14)
    for work in range(tl.program_id(0), count * HEADS, tl.num_programs(0)):
        item = items + work // HEADS * ITEM_WORDS
        batch = tl.load(item)
        group = work % HEADS + 0 * batch  # a tensor in the interpreter, too
        q_start = tl.load(item + 1)
        q_len = tl.load(item + 2)
        kv_len = tl.load(item + 3)
        kv_start = tl.load(item + 4)
        first = tl.load(item + 5)
        row = first + local
        ours = (local < ROWS) & (row < q_len * PACK)
        if tl.load(item + 11) > 0:  # the first range's item does it
            ours = ours & (row < 0)
        marked = ours.to(tl.int32)
        if OUTPUT is None:
            place = batch * out_request + (q_start + row // PACK).to(tl.int64) * out_token
            place += (group * PACK + row % PACK).to(tl.int64) * out_head
            marked = tl.zeros([ROOM], tl.int32)
            for start in tl.static_range(0, VALUE_DIM, COLUMNS):
                column = start + tl.arange(0, COLUMNS)
                inside = ours[:, None] & (column < VALUE_DIM)[None, :]
                x = tl.load(out + place[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
                marked = tl.maximum(marked, tl.max((x != x).to(tl.int32), 1))
        if tl.max(marked, 0) > 0:
            kv_head = group * PACK // GROUP
            at = (batch, kv_head, q_len, kv_len, q_start, kv_start)
            wide_head = kv_head.to(tl.int64)
            c = sm_scale
            v_factor = 1.0
            if SCALES:
                c = sm_scale * tl.load(k_scale + wide_head * k_scale_head)
                v_factor = tl.load(v_scale + wide_head * v_scale_head)
            for n in range(ROWS):
                if tl.max(tl.where(local == n, marked, 0), 0) > 0:
                    head = group * PACK + (first + n) % PACK
                    exact_row(
                        (first + n) // PACK * GROUP + head % GROUP, q, k + wide_head * k_head * VEC,
                        v + wide_head * v_head * VEC, out, lse, k_scale, v_scale, pages, tl.load(item + 8),
                        tl.load(item + 9), q_request, q_token, q_head_step, k_page, k_token, v_page, v_token,
                        out_request, out_token, out_head, lse_request, lse_token, lse_head, 0, 0, c, 1.0, v_factor,
                        flags, at, values, QUERY, QUERY_INDEX, QUERY_LOADS, None, None, 0, LOGITS, MASK, OUTPUT, True,
                        GROUP, DIM, VALUE_DIM, D0, D1, V0, V1, PAGE_SIZE, 16, VEC, VEC, VEC, 0, 1 if SCALES else 0,
                        False,
                    )  # fmt: skip
    if tl.atomic_add(done, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1:
        tl.store(done, 0)
        tl.store(marks, 0)
