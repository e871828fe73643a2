"""Writing this step's keys and values into their pages, quantised where the cache is."""

import triton
import triton.language as tl


@triton.jit
def _float8_bits(x, MANTISSA: tl.constexpr):
    """The bits of float8 e4m3 (MANTISSA 3) or e5m2 (2) nearest to float32 x, ties to even, for targets without
    these types: rounded in float32's own encoding, or by adding a number of the right grain where it is subnormal."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    SHIFT: tl.constexpr = 23 - MANTISSA
    LEAST: tl.constexpr = 0x3C800000 if MANTISSA == 3 else 0x38800000  # the smallest normal number
    GRAIN: tl.constexpr = 0x46800000 if MANTISSA == 3 else 0x43000000  # 2 ** 14, 2 ** 7: float32 steps as wide as its
    grain = tl.full([], GRAIN, tl.int32).to(tl.float32, bitcast=True)
    normal = (
        size + ((1 << (SHIFT - 1)) - 1) + ((size >> SHIFT) & 1) - ((120 if MANTISSA == 3 else 112) << 23)
    ) >> SHIFT
    tiny = (size.to(tl.float32, bitcast=True) + grain).to(tl.int32, bitcast=True) - GRAIN
    code = tl.where(size < LEAST, tiny, normal)
    code = tl.where(size > 0x7F800000, 0x7F, code)
    return (((bits >> 24) & 0x80) | code).to(tl.uint8)


@triton.jit
def _store_row(x, to, scale, mask, HIGHEST: tl.constexpr, MANTISSA: tl.constexpr):
    """Divide by scale, clamp to what the storage holds (0: no clamp), round to nearest even, store. NaN stays NaN,
    in int8 it becomes 0. MANTISSA: bits of a float8 that is stored as uint8, else 0."""
    x = x.to(tl.float32)
    x = tl.div_rn(x, scale + tl.zeros_like(x))
    if to.dtype.element_ty == tl.int8:
        x = tl.where(x != x, 0.0, tl.minimum(tl.maximum(x, -128.0), 127.0))
    elif HIGHEST > 0:
        x = tl.where(x != x, x, tl.minimum(tl.maximum(x, -HIGHEST), HIGHEST))
    if MANTISSA > 0:
        tl.store(to, _float8_bits(x, MANTISSA), mask=mask)
    elif to.dtype.element_ty == tl.int8:
        near = tl.floor(x + 0.5)
        tie = (near - x == 0.5) & (near - 2.0 * tl.floor(near * 0.5) == 1.0)
        tl.store(to, tl.where(tie, near - 1.0, near).to(tl.int8), mask=mask)
    else:
        tl.store(to, x.to(to.dtype.element_ty), mask=mask)


@triton.jit
def append(
    k, v, k_cache, v_cache, k_scale, v_scale, slots,
    tokens, k_token, k_head, v_token, v_head, kc_page, kc_token, kc_head, vc_page, vc_token, vc_head,
    ks_page, ks_head, vs_page, vs_head, page_size,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
    SCALED: tl.constexpr, HIGHEST: tl.constexpr, MANTISSA: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Grid: (ceil(tokens * KV_HEADS / ROWS),). k [tokens, KV_HEADS, DIM], v likewise, caches [pages, page_size,
    KV_HEADS, ...] with any
    strides but the last; slots int64 [tokens]: page * page_size + offset, negative: skip."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token = row // KV_HEADS
    head = row % KV_HEADS
    ok = token < tokens
    slot = tl.load(slots + token, mask=ok, other=-1)
    ok = ok & (slot >= 0)
    slot = tl.maximum(slot, 0)
    page, offset = slot // page_size, slot % page_size
    column = tl.arange(0, BLOCK_D)
    k_scales = tl.full([ROWS], 1.0, tl.float32)
    v_scales = k_scales
    if SCALED:
        k_scales = tl.load(k_scale + page * ks_page + head * ks_head, mask=ok, other=1.0)
        v_scales = tl.load(v_scale + page * vs_page + head * vs_head, mask=ok, other=1.0)
    mask = ok[:, None] & (column < DIM)[None, :]
    x = tl.load(k + (token * k_token + head * k_head)[:, None] + column[None, :], mask=mask, other=0.0)
    to = k_cache + (page * kc_page + offset * kc_token + head * kc_head)[:, None] + column[None, :]
    _store_row(x, to, k_scales[:, None], mask, HIGHEST, MANTISSA)
    if VALUES:
        mask = ok[:, None] & (column < VALUE_DIM)[None, :]
        x = tl.load(v + (token * v_token + head * v_head)[:, None] + column[None, :], mask=mask, other=0.0)
        to = v_cache + (page * vc_page + offset * vc_token + head * vc_head)[:, None] + column[None, :]
        _store_row(x, to, v_scales[:, None], mask, HIGHEST, MANTISSA)
