"""Rows that came out as NaN, once more, from the keys that they see and no others.

The products of a tile multiply what a mask hides by 0, and a NaN or an infinity survives that. To keep them out of the
products would cost every tile, so rows are looked at when they are done, and such a one is computed here: by itself,
without tensor cores, reading hidden keys and values as zeros.
"""

import triton
import triton.language as tl
from flashloom.attention.kernels.triton.finish import finish
from flashloom.attention.kernels.triton.tiles import (
    load_keys,
    load_queries,
    load_tile,
    stored,
    tile_places,
    token_offsets,
    token_pages,
)

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LEAST = tl.constexpr(1.1754943508222875e-38)  # a weight that is more than nothing: an infinite value stays infinite


@triton.jit
def odd_rows(acc0, acc1, TWO: tl.constexpr):
    """1 for each row with a NaN."""
    odd = tl.max((acc0 != acc0).to(tl.int32), 1)
    if TWO:
        odd = tl.maximum(odd, tl.max((acc1 != acc1).to(tl.int32), 1))
    return odd


@triton.jit
def any_odd(acc0, acc1, TWO: tl.constexpr):
    """1 where some row has one."""
    odd = tl.max((acc0 != acc0).to(tl.int32), None)
    if TWO:
        odd = tl.maximum(odd, tl.max((acc1 != acc1).to(tl.int32), None))
    return odd


@triton.jit
def exact_row(
    number, q, k, v, out, lse, k_scale, v_scale, pages, page_begin, first_page, q_request, q_token, q_head_step, k_page,
    k_token, v_page, v_token, out_request, out_token, out_head, lse_request, lse_token, lse_head, k_scale_page,
    v_scale_page, c, scale, v_factor, flags, at, values,
    QUERY: tl.constexpr, QUERY_INDEX: tl.constexpr, QUERY_LOADS: tl.constexpr, KEY: tl.constexpr, KEY_INDEX:
    tl.constexpr, KEY_LOADS: tl.constexpr, LOGITS: tl.constexpr, MASK: tl.constexpr, OUTPUT: tl.constexpr, SOFTMAX:
    tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    V0: tl.constexpr, V1: tl.constexpr, PAGE_SIZE: tl.constexpr, N: tl.constexpr, VEC_Q: tl.constexpr, VEC_K:
    tl.constexpr, VEC_V: tl.constexpr, K_SCALE: tl.constexpr, V_SCALE: tl.constexpr, E4M3_BITS: tl.constexpr,
):  # fmt: skip
    """Packed row `number` of the request, over all of its keys, N at a time; arguments as in `attend`, k, v and their
    scales at their head."""
    batch, kv_head, q_len, kv_len, q_start, kv_start = at
    row = number + tl.arange(0, 1)
    token = row // GROUP
    q_head = kv_head * GROUP + row % GROUP
    q_pos = kv_len - q_len + token
    here = row >= 0
    q_row = (
        batch.to(tl.int64) * q_request + (q_start + token).to(tl.int64) * q_token + q_head.to(tl.int64) * q_head_step
    ) * VEC_Q
    q0 = load_queries(q, q_row, here, q_head, q_pos, at, values, QUERY, QUERY_INDEX, QUERY_LOADS, DIM, D0, 0)
    q0 = q0.to(tl.float32)
    q1 = q0
    if D1 > 0:
        q1 = load_queries(q, q_row, here, q_head, q_pos, at, values, QUERY, QUERY_INDEX, QUERY_LOADS, DIM, D1, D0)
        q1 = q1.to(tl.float32)
    acc0 = tl.zeros([1, V0], tl.float32)
    acc1 = tl.zeros([1, 32 if V1 == 0 else V1], tl.float32)
    top = tl.zeros([1], tl.float32) + float("-inf")
    total = tl.zeros([1], tl.float32)
    lost = tl.zeros([1], tl.int32)
    for tile in range(tl.cdiv(kv_len, N)):
        kv_pos = tile * N + tl.arange(0, N)
        seen = (kv_pos < kv_len)[None, :]
        if MASK is not None:
            seen = seen & MASK(
                batch, q_head[:, None], kv_head, q_pos[:, None], kv_pos[None, :], q_len, kv_len, q_start, kv_start,
                values,
            )  # fmt: skip
        some = tl.max(seen.to(tl.int32), 0)
        if tl.max(some, 0) > 0:
            live = some > 0
            page = token_pages(tile, kv_len, pages, page_begin, first_page, PAGE_SIZE, N).to(tl.int64)
            first_token, within = token_offsets(tile, PAGE_SIZE, N)
            where, rows = tile_places(k, page, k_page, first_token, within, k_token, VEC_K, 1, PAGE_SIZE, N)
            key_scale = scale
            if K_SCALE == 2:
                k_factor = tl.load(k_scale + (page + tl.zeros([N], tl.int64)) * k_scale_page, mask=live, other=0.0)
                key_scale = k_factor[:, None]
            key = load_keys(
                where, rows, kv_pos, at, key_scale, values, live, KEY, KEY_INDEX, KEY_LOADS, DIM, D0, 0, tl.float32,
                E4M3_BITS, True,
            )  # fmt: skip
            s = tl.sum(q0 * key, 1)
            if D1 > 0:
                key = load_keys(
                    where, rows, kv_pos, at, key_scale, values, live, KEY, KEY_INDEX, KEY_LOADS, DIM, D1, D0,
                    tl.float32, E4M3_BITS, True,
                )  # fmt: skip
                s += tl.sum(q1 * key, 1)
            s = s * c
            if K_SCALE == 2 and KEY is None:
                s = s * k_factor
            s = s[None, :]
            if LOGITS is not None:
                s = LOGITS(
                    s, batch, q_head[:, None], kv_head, q_pos[:, None], kv_pos[None, :], q_len, kv_len, q_start,
                    kv_start, values,
                ) + tl.zeros_like(s)  # fmt: skip
            if SOFTMAX:
                s = tl.where(seen, s * LOG2E, float("-inf"))
                lost = lost | tl.max(tl.where(s < float("inf"), 0, 1), 1)
                new_top = tl.maximum(top, tl.max(s, 1))
                base = tl.where(new_top == float("-inf"), 0.0, new_top)
                p = tl.where(s == float("-inf"), 0.0, tl.maximum(tl.exp2(s - base[:, None]), LEAST))
                rescale = tl.maximum(tl.exp2(top - base), LEAST)
                total = total * rescale + tl.sum(p, 1)
                acc0 = acc0 * rescale[:, None]
                acc1 = acc1 * rescale[:, None]
                top = new_top
            else:
                p = tl.where(seen, s, 0.0)
            weight = tl.sum(p, 0)
            if V_SCALE == 2:
                weight *= tl.load(v_scale + (page + tl.zeros([N], tl.int64)) * v_scale_page, mask=live, other=0.0)
            where, rows = tile_places(v, page, v_page, first_token, within, v_token, VEC_V, 1, PAGE_SIZE, N)
            value = stored(
                load_tile(where, rows, tl.arange(0, V0), live, VALUE_DIM, V0, 0, True), tl.float32, E4M3_BITS
            )
            acc0 += tl.sum(weight[:, None] * value, 0)[None, :]
            if V1 > 0:
                value = stored(
                    load_tile(where, rows, V0 + tl.arange(0, V1), live, VALUE_DIM, V1, V0, True), tl.float32, E4M3_BITS
                )
                acc1 += tl.sum(weight[:, None] * value, 0)[None, :]
    state = top
    if SOFTMAX:
        total = tl.where(lost > 0, float("nan"), total)
        whole = tl.where(total == 0.0, 1.0, total)
        acc0 = acc0 / whole[:, None]
        acc1 = acc1 / whole[:, None]
        state = tl.where(total == 0.0, float("-inf"), top + tl.log2(whole))
    if V_SCALE == 1:
        acc0 = acc0 * v_factor
        acc1 = acc1 * v_factor
    finish(
        acc0, state * LN2, row, here, out, lse, at, out_request, out_token, out_head, lse_request, lse_token, lse_head,
        flags, values, OUTPUT, SOFTMAX, GROUP, VALUE_DIM, V0, 0,
    )  # fmt: skip
    if V1 > 0:
        finish(
            acc1, state * LN2, row, here, out, lse, at, out_request, out_token, out_head, lse_request, lse_token,
            lse_head, flags, values, OUTPUT, SOFTMAX, GROUP, VALUE_DIM, V1, V0,
        )  # fmt: skip
