"""The end of a tile: states of its splits combined, the output hook, and the store of out and lse."""

# ruff: noqa: SIM102
import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def finish(
    acc, lse, row, row_mask, out, lse_out, at, out_request, out_token, out_head, lse_request, lse_token, lse_head,
    flags, values,
    OUTPUT: tl.constexpr, SOFTMAX: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
    FIRST: tl.constexpr,
):  # fmt: skip
    """Apply the output hook to acc [R, BLOCK] (columns FIRST and on), whose rows have the natural lse [R], and store
    both.

    row: the packed row numbers (query token * GROUP + head within the group) within the request. flags: bit 0 store
    lse, bit 1 partial.
    """
    batch, kv_head, q_len, kv_len, q_start, kv_start = at
    token = row // GROUP
    head = kv_head * GROUP + row % GROUP
    column = FIRST + tl.arange(0, BLOCK)
    if OUTPUT is not None:
        if flags & 2 == 0:
            q_pos = kv_len - q_len + token
            acc = OUTPUT(
                acc, lse[:, None], batch, head[:, None], kv_head, q_pos[:, None], q_len, kv_len, q_start, kv_start,
                column[None, :], values
            ) + tl.zeros_like(acc)  # fmt: skip
    if SOFTMAX:
        acc = tl.where((lse == float("-inf"))[:, None], 0.0, acc)
    acc = tl.where(kv_len == 0, 0.0, acc)
    request = batch.to(tl.int64)
    where = request * out_request + (q_start + token).to(tl.int64) * out_token + head.to(tl.int64) * out_head
    inside = row_mask[:, None]
    if FIRST + BLOCK > DIM:
        inside = inside & (column < DIM)[None, :]
    tl.store(out + where[:, None] + column[None, :], acc.to(out.dtype.element_ty), mask=inside)
    if SOFTMAX and FIRST == 0:
        if flags & 1:
            to = request * lse_request + (q_start + token).to(tl.int64) * lse_token + head.to(tl.int64) * lse_head
            tl.store(lse_out + to, lse, mask=row_mask)


@triton.jit
def combine(
    part_out, part_lse, slot, splits, row, row_mask,
    SOFTMAX: tl.constexpr, BLOCK_M: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, FIRST: tl.constexpr,
    SLOT_STEP: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """The state of `splits` partial states, in their order: (out [ROWS, BLOCK], base-2 lse [ROWS]).

    Partial state i is at slot + i * SLOT_STEP: its out [BLOCK_M, DIM] is normalised, its lse base 2. `row`: rows within
    the tile.
    """
    column = FIRST + tl.arange(0, BLOCK)
    acc = tl.zeros([ROWS, BLOCK], tl.float32)
    top = tl.zeros([ROWS], tl.float32) + float("-inf")
    total = tl.zeros([ROWS], tl.float32)
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        at_row = (slot + split.to(tl.int64) * SLOT_STEP)[None, :] * BLOCK_M + row[:, None]  # [ROWS, SPLITS]
        valid = (split < splits)[None, :] & row_mask[:, None]
        inside = valid[:, :, None] & (column < DIM)[None, None, :]
        part = tl.load(
            part_out + at_row[:, :, None] * DIM + column[None, None, :], mask=inside, other=0.0, cache_modifier=".cg"
        )
        if SOFTMAX:
            state = tl.load(part_lse + at_row, mask=valid, other=float("-inf"), cache_modifier=".cg")
            new_top = tl.maximum(top, tl.max(state, 1))
            safe = tl.where(new_top == float("-inf"), 0.0, new_top)
            weight = tl.exp2(state - safe[:, None])
            rescale = tl.exp2(top - safe)
            acc = acc * rescale[:, None] + tl.sum(part * weight[:, :, None], 1)
            total = total * rescale + tl.sum(weight, 1)
            top = new_top
        else:
            acc += tl.sum(part, 1)
    if SOFTMAX:
        acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        top = tl.where(total == 0.0, float("-inf"), top + tl.log2(total))
    return acc, top


@triton.jit
def merge(
    out_a, lse_a, out_b, lse_b, out, lse, a_row, b_row, out_row, rows, dim,
    SOFTMAX: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Merge two partial states row by row: out_* [rows, dim] with row strides, lse_* float32 [rows] natural,
    contiguous."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, DIM)
    ok = row < rows
    inside = ok[:, None] & (column < dim)[None, :]
    wide = row.to(tl.int64)[:, None]
    a = tl.load(out_a + wide * a_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
    b = tl.load(out_b + wide * b_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if SOFTMAX:
        la = tl.load(lse_a + row, mask=ok, other=float("-inf"))
        lb = tl.load(lse_b + row, mask=ok, other=float("-inf"))
        top = tl.maximum(la, lb)
        safe = tl.where(top == float("-inf"), 0.0, top)
        wa, wb = tl.exp(la - safe), tl.exp(lb - safe)
        total = wa + wb
        whole = tl.where(total == 0.0, 1.0, total)
        merged = a * (wa / whole)[:, None] + b * (wb / whole)[:, None]
        tl.store(lse + row, tl.where(total == 0.0, float("-inf"), safe + tl.log(whole)), mask=ok)
    else:
        merged = a + b
    tl.store(out + wide * out_row + column[None, :], merged.to(out.dtype.element_ty), mask=inside)
