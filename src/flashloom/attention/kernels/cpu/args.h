// What a launch is told, and what one piece of its work is.
//
// Args is filled by Python (attention/cpu.py mirrors it field by field, all of 8 bytes) once per plan; run() overwrites only
// what changed. All strides are in elements.
#pragma once
#include "loads.h"

namespace flashloom {

// A piece of one request: some of its rows under some KV heads, over a range of its keys.
// Rows are (query token, head of the group) stacked: row = token * group + head.
struct Item {
  int32_t request, kv_head_lo, kv_head_hi;  // heads [lo, hi)
  int32_t row_lo, row_hi;                   // rows [lo, hi) of the request
  int32_t kv_lo, kv_hi;                     // keys [lo, hi) of the request
  int32_t split, splits;                    // which of how many pieces of the same rows; 1 = alone
  int32_t merge;                            // index of the counter of pieces done (-1: alone)
  int64_t partial;                          // offset in `workspace`, in floats, of piece 0 of the same rows
};

struct Args {
  // run: tensors
  const void *q, *k, *v;
  void* out;
  float* lse;  // or null
  const float *k_scale, *v_scale;  // or null (1)
  const int64_t* words;            // the variant's parameters
  double sm_scale;
  int64_t partial;                                         // leave out output_transform
  int64_t out_type;                                        // 0 float32, 1 float16, 2 bfloat16
  // row of token t (counted through the batch) of request b: b * request + t * token
  int64_t q_request, q_token, q_head, out_request, out_token, out_head, lse_request, lse_token, lse_head;
  int64_t k_page, k_token, k_head, v_page, v_token, v_head;
  int64_t k_scale_page, k_scale_head, v_scale_page, v_scale_head;  // 0 where shared
  // plan, update: the batch
  const int32_t *q_indptr, *kv_indptr, *kv_lens, *page_indptr, *pages;
  int64_t page_size, requests, kv_heads, threads, batch_invariant;
  // plan, update: the schedule
  Item* items;
  int64_t item_count, item_capacity;
  float* workspace;  // partial results: per row value_dim floats, then maximum and sum
  int64_t workspace_size;  // floats needed, set by schedule()
  int32_t* counters;       // one per split group of rows, zero between launches
  int64_t counter_count;
  char* scratch;           // per thread
  int64_t scratch_size;    // bytes per thread, set by schedule()
  // how the schedule cuts (config.py); 0: what the kernel would choose
  int64_t cut_pieces, cut_shortest, cut_state, cut_decode_rows, cut_block_rows;
};

// Where hooks are evaluated. Lane vectors are of rows (RowsAt) or of keys (KeysAt).
struct RowsAt {
  int32_t batch, kv_head, q_len, kv_len, q_start, kv_start;
  vi q_head, q_pos;
};
struct KeysAt {
  int32_t batch, kv_head, q_len, kv_len, q_start, kv_start;
  int32_t q_head, q_pos, kv_pos;
};

// One request, read once per item.
struct Request {
  int32_t batch, q_len, kv_len, q_start, kv_start;
  const int32_t* pages;
  FL_INLINE Request(const Args& a, int32_t b)
      : batch(b), q_len(a.q_indptr[b + 1] - a.q_indptr[b]), kv_len(a.kv_lens[b]), q_start(a.q_indptr[b]),
        kv_start(a.kv_indptr[b]), pages(a.pages + a.page_indptr[b]) {}
  FL_INLINE KeysAt at(int32_t kv_head, int32_t q_head, int32_t token) const {
    return {batch, kv_head, q_len, kv_len, q_start, kv_start, q_head, kv_len - q_len + token, 0};
  }
};

// Element offsets of keys [t, t + n) without the head's part, page by page. `scale` (or null) gets the page of each key.
FL_OUTLINE void key_offsets(const Args& a, const Request& r, int32_t t, int n, int64_t page_stride, int64_t token_stride,
                           int64_t* offset) {
  int64_t page = t / a.page_size, in = t % a.page_size;
  for (int i = 0; i < n;) {
    int64_t start = r.pages[page] * page_stride;
    for (; i < n && in < a.page_size; i++, in++) offset[i] = start + in * token_stride;
    page++, in = 0;
  }
}
FL_OUTLINE void key_scales(const Args& a, const Request& r, int32_t t, int n, const float* scale, int64_t page_stride,
                          int64_t head, float* to) {
  int64_t page = t / a.page_size, in = t % a.page_size;
  for (int i = 0; i < n;) {
    float x = scale[r.pages[page] * page_stride + head];
    for (; i < n && in < a.page_size; i++, in++) to[i] = x;
    page++, in = 0;
  }
}

constexpr float LOG2E = 1.44269504088896341f, LN2 = 0.693147180559945309f;

constexpr int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// Storage of q, KV and out beside the parameters' tags.
struct e4m3 {
  typedef uint8_t raw;
  static FL_INLINE vf block(const void* p, int64_t i) { return e4m3_to_float(load_u8((const uint8_t*)p + i)); }
  static FL_INLINE float one(const void* p, int64_t i) { return e4m3_to_float(vu{((const uint8_t*)p)[i]})[0]; }
};
struct e5m2 {
  typedef uint8_t raw;
  static FL_INLINE vf block(const void* p, int64_t i) { return e5m2_to_float(load_u8((const uint8_t*)p + i)); }
  static FL_INLINE float one(const void* p, int64_t i) { return e5m2_to_float(vu{((const uint8_t*)p)[i]})[0]; }
};
struct s8 {
  typedef int8_t raw;
  static FL_INLINE vf block(const void* p, int64_t i) {
    return __builtin_convertvector(load_i8((const int8_t*)p + i), vf);
  }
  static FL_INLINE float one(const void* p, int64_t i) { return ((const int8_t*)p)[i]; }
};

// n elements of storage T to floats; the rest up to a multiple of VL becomes 0. Reads nothing beyond the n.
template <class T> FL_OUTLINE void row_to_float(const void* from, int64_t at, int n, float* to) {
  int d = 0;
  for (; d + VL <= n; d += VL) storeu(to + d, T::block(from, at + d));
  if (d == n) return;
  typename T::raw rest[VL] = {};
  for (int i = 0; d + i < n; i++) rest[i] = ((const typename T::raw*)from)[at + d + i];
  storeu(to + d, T::block(rest, 0));
}

// 2 VL elements of storage T as two vectors: of their halves, or (bfloat16) of the even and of the odd ones, which costs one
// instruction each.
template <class T> struct pair {
  static constexpr bool interleaved = false;
  static FL_INLINE void load(const void* p, int64_t i, vf& a, vf& b) { a = T::block(p, i), b = T::block(p, i + VL); }
};
template <> struct pair<bf16> {
  static constexpr bool interleaved = true;
  static FL_INLINE void load(const void* p, int64_t i, vf& a, vf& b) {
    vu x = (vu)*(const vi_u*)((const uint16_t*)p + i);
    a = (vf)(x << 16), b = (vf)(x & 0xffff0000u);
  }
};

FL_OUTLINE void store_row(const Args& a, int64_t at, const float* x, int n) {
  int d = 0;
  if (a.out_type == 0) {
    float* o = (float*)a.out + at;
    for (; d + VL <= n; d += VL) storeu(o + d, loadu(x + d));
    for (; d < n; d++) o[d] = x[d];
    return;
  }
  uint16_t* o = (uint16_t*)a.out + at;
  for (; d < n; d += VL) {
    vh h = a.out_type == 1 ? float_to_f16(loadu(x + d)) : float_to_bf16(loadu(x + d));
    if (d + VL <= n) {
      *(vh_u*)(o + d) = h;
    } else {
      for (int i = 0; d + i < n; i++) o[d + i] = h[i];
    }
  }
}

}  // namespace flashloom
