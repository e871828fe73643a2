// Rows of queries, keys and values into AMX tiles, as bfloat16.
//
// A step is 32 keys. K is packed [dim / 32][2 tiles of 16 keys x 32 dims], V^T [dim / 32][2 tiles of 16 dims x 32 keys], and
// the queries of 32 rows [dim / 32][2 tiles of 16 dim pairs x 16 rows]. Rows that are bfloat16, a multiple of 32 wide and not
// transformed are read where they lie; others are made so in scratch first. What is missing becomes zero.
#pragma once
#include "amx.h"
#include "args.h"

namespace flashloom {

constexpr int STEP = 32;

// Row pointers, each good for W (a multiple of 32) elements.
template <int W> struct PackScratch {
  alignas(64) uint16_t zero[W], staged[STEP][W];
  float row[W], transformed[W];
};

template <int W> FL_INLINE void to_bf16(const float* x, int n, uint16_t* to) {  // zero from n on
  for (int d = 0; d < W; d += 32) {
    vi lane = iota() + d;
    vf a = loadu(x + d), b = loadu(x + d + 16);
    if (d + 32 > n) a = lane < n ? a : vf{}, b = lane + 16 < n ? b : vf{};
    *(v32h*)(to + d) = join_bf16(a, b);
  }
}

template <class C, class V> struct Packer {
  typedef typename V::Params Params;
  static constexpr int DIM = C::DIM, VALUE_DIM = C::VALUE_DIM, G = C::GROUP;
  static constexpr int DK = (DIM + 31) / 32, DV = (VALUE_DIM + 31) / 32;
  static constexpr int W = (DK > DV ? DK : DV) * 32;
  typedef PackScratch<W> Scratch;
  static constexpr bool BF16 = same<typename C::KV, bf16>::value;

  const Args& a;
  const Params& p;
  const Request& r;
  int32_t kv_head;
  Scratch& w;
  bool scale_keys, scale_values;  // while packing; otherwise scales are the caller's

  // Tile [16 pairs][16 rows] per 32 dims, of 16 rows.
  static FL_OUTLINE void transposed(const uint16_t* const* from, char* to) {
    for (int d = 0; d < DK; d++) {
      vi x[16];
#pragma GCC unroll 4
      for (int i = 0; i < 16; i++) x[i] = *(const vi_u*)(from[i] + d * 32);
      transpose16(x);
#pragma GCC unroll 4
      for (int i = 0; i < 16; i++) *(vi*)(to + d * 2 * TILE + i * 64) = x[i];
    }
  }

  // Rows [first, first + 32) of the request, as far as `end`.
  FL_OUTLINE void queries(int32_t first, int32_t end, char* to) {
    const uint16_t* from[STEP];
    for (int i = 0, token = first / G, head = first % G; i < STEP; i++) {
      const uint16_t* x = w.zero;
      if (first + i < end) {
        int32_t q_head = kv_head * G + head;
        x = (const uint16_t*)a.q + r.batch * a.q_request + (r.q_start + token) * a.q_token + q_head * a.q_head;
        if constexpr (V::has_query || DIM % 32 != 0) {
          row_to_float<bf16>(x, 0, DIM, w.row);
          if constexpr (V::has_query) V::transform_query(w.row, w.transformed, r.at(kv_head, q_head, token), p);
          to_bf16<DK * 32>(V::has_query ? w.transformed : w.row, DIM, w.staged[i]);
          x = w.staged[i];
        }
      }
      from[i] = x;
      if (++head == G) head = 0, token++;
    }
    transposed(from, to);
    transposed(from + 16, to + TILE);
  }

  // Keys [t, t + 32) as far as `end`, and their values.
  FL_OUTLINE void keys(int32_t t, int32_t end, char* to) {
    const uint16_t* from[STEP];
    int64_t at[STEP];
    float scale[STEP];
    int n = min_of(STEP, end - t);
    key_offsets(a, r, t, n, a.k_page, a.k_token, at);
    if (scale_keys) key_scales(a, r, t, n, a.k_scale, a.k_scale_page, kv_head * a.k_scale_head, scale);
    for (int i = 0; i < STEP; i++) {
      from[i] = w.zero;
      if (i >= n) continue;
      from[i] = (const uint16_t*)a.k + at[i] + kv_head * a.k_head;
      if (BF16 && !V::has_key && DIM % 32 == 0 && !scale_keys) continue;
      row_to_float<typename C::KV>(a.k, at[i] + kv_head * a.k_head, DIM, w.row);
      if (scale_keys)
        for (int d = 0; d < DIM; d += VL) storeu(w.row + d, loadu(w.row + d) * scale[i]);
      if constexpr (V::has_key) {
        KeysAt key = r.at(kv_head, 0, 0);
        key.kv_pos = t + i;
        V::transform_key(w.row, w.transformed, key, p);
      }
      to_bf16<DK * 32>(V::has_key ? w.transformed : w.row, DIM, w.staged[i]);
      from[i] = w.staged[i];
    }
    for (int i = 0; i < STEP; i++)
      for (int d = 0; d < DK; d++) *(vi*)(to + d * 2 * TILE + i * 64) = *(const vi_u*)(from[i] + d * 32);
  }

  FL_OUTLINE void values(int32_t t, int32_t end, char* to) {
    const uint16_t* from[STEP];
    int64_t at[STEP];
    float scale[STEP];
    int n = min_of(STEP, end - t);
    key_offsets(a, r, t, n, a.v_page, a.v_token, at);
    if (scale_values) key_scales(a, r, t, n, a.v_scale, a.v_scale_page, kv_head * a.v_scale_head, scale);
    for (int i = 0; i < STEP; i++) {
      from[i] = w.zero;
      if (i >= n) continue;
      from[i] = (const uint16_t*)a.v + at[i] + kv_head * a.v_head;
      if (BF16 && VALUE_DIM % 32 == 0 && !scale_values) continue;
      row_to_float<typename C::KV>(a.v, at[i] + kv_head * a.v_head, VALUE_DIM, w.row);
      if (scale_values)
        for (int d = 0; d < VALUE_DIM; d += VL) storeu(w.row + d, loadu(w.row + d) * scale[i]);
      to_bf16<DV * 32>(w.row, VALUE_DIM, w.staged[i]);
      from[i] = w.staged[i];
    }
    for (int d = 0; d < DV; d++) {
      vi lo[16], hi[16];
#pragma GCC unroll 4
      for (int j = 0; j < 16; j++) {
        v32h x = *(const v32h_u*)(from[2 * j] + d * 32), y = *(const v32h_u*)(from[2 * j + 1] + d * 32);
        lo[j] = (vi)__builtin_shufflevector(x, y, 0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42,
                                            11, 43, 12, 44, 13, 45, 14, 46, 15, 47);
        hi[j] = (vi)__builtin_shufflevector(x, y, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55, 24, 56, 25,
                                            57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63);
      }
      transpose16(lo);
      transpose16(hi);
#pragma GCC unroll 4
      for (int i = 0; i < 16; i++) {
        *(vi*)(to + (d * 2) * TILE + i * 64) = lo[i];
        *(vi*)(to + (d * 2 + 1) * TILE + i * 64) = hi[i];
      }
    }
  }
};

}  // namespace flashloom
