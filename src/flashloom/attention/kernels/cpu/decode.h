// Few rows (decode, a few speculated tokens): bound by reading keys and values once.
//
// All heads of an item pass over a block of keys before the next one is touched, so that pages are read from end to end
// (with tokens outermost a head's rows are kilobytes apart, and each would be a new DRAM page and a new TLB entry). Lanes
// are the head dim in both products; a register block of rows x keys keeps each loaded vector busy, and the sums across
// lanes of VL scores cost one tree of shuffles. In between lanes are keys.
#pragma once
#include "finish.h"

namespace flashloom {

template <class C, class V> struct DecodeKernel {
  typedef typename V::Params Params;
  typedef typename C::KV KV;
  typedef Finish<C, V> End;
  static constexpr int D = C::DIM, DV = C::VALUE_DIM, G = C::GROUP;
  static constexpr int DP = round_up(D, 2 * VL), DVP = round_up(End::DVP, 2 * VL);
  static constexpr int BLOCK = 64;
  static constexpr int MAX_ROWS = 16;
  static constexpr bool DIRECT_K = D % (2 * VL) == 0 && !V::has_key, DIRECT_V = DV % (2 * VL) == 0;
  static constexpr bool ZIPPED_K = DIRECT_K && pair<KV>::interleaved, ZIPPED_V = DIRECT_V && pair<KV>::interleaved;

  struct Row {
    float q[DP];   // times sm_scale (and log2 e, and the key's scale, where nothing comes between)
    float o[DVP];
    float l[VL];   // partial sums
    float m, v_scale;
  };
  struct Scratch {
    float s[MAX_ROWS * BLOCK];
    float k[DIRECT_K ? VL : BLOCK * DP], v[DIRECT_V ? VL : BLOCK * DVP];
    float transformed[DP];
    int64_t k_at[BLOCK], v_at[BLOCK], k_in[BLOCK], v_in[BLOCK];
    float k_scale[BLOCK], v_scale[BLOCK];
    Row rows[1];  // [head][row]
  };
  static constexpr int64_t scratch_size(int64_t rows) { return sizeof(Scratch) + rows * (int64_t)sizeof(Row); }

  const Args& a;
  const Params& p;
  Scratch& w;
  const Item& it;
  Request r;
  int rows;

  DecodeKernel(const Args& a, const Params& p, char* scratch, const Item& it)
      : a(a), p(p), w(*(Scratch*)scratch), it(it), r(a, it.request), rows(it.row_hi - it.row_lo) {}

  static FL_INLINE float factor(const Args& a) { return (float)a.sm_scale * (V::softmax && !V::has_logits ? LOG2E : 1.f); }

  void load_query(Row& x, int32_t kv_head, int32_t row) {
    int32_t q_head = kv_head * G + row % G;
    int64_t from = (r.q_start + row / G) * a.q_token + q_head * a.q_head;
    row_to_float<typename C::Q>(a.q, from, D, V::has_query ? w.transformed : x.q);
    if (V::has_query) V::transform_query(w.transformed, x.q, r.at(kv_head, q_head, row / G), p);
    for (int d = round_up(D, VL); d < DP; d += VL) storeu(x.q + d, vf{});
    for (int d = D; d < DP; d++) x.q[d] = 0.f;
    float scale = factor(a);
    for (int d = 0; d < DP; d += 2 * VL) {
      vf u = loadu(x.q + d) * scale, v = loadu(x.q + d + VL) * scale;
      storeu(x.q + d, ZIPPED_K ? evens(u, v) : u), storeu(x.q + d + VL, ZIPPED_K ? odds(u, v) : v);
    }
    for (int d = 0; d < DVP; d += VL) storeu(x.o + d, vf{});
    storeu(x.l, vf{});
    x.m = -__builtin_inff();
  }

  // Where this head's keys and values of the block are; what cannot be read directly is made float32 in scratch.
  void load_keys(int32_t kv_head, int32_t t, int n) {
    for (int i = 0; i < n; i++) w.k_in[i] = w.k_at[i] + kv_head * a.k_head, w.v_in[i] = w.v_at[i] + kv_head * a.v_head;
    if (a.k_scale) key_scales(a, r, t, n, a.k_scale, a.k_scale_page, kv_head * a.k_scale_head, w.k_scale);
    if (a.v_scale) key_scales(a, r, t, n, a.v_scale, a.v_scale_page, kv_head * a.v_scale_head, w.v_scale);
    if (!DIRECT_K) {
      for (int i = 0; i < n; i++) {
        float* to = V::has_key ? w.transformed : w.k + i * DP;
        row_to_float<KV>(a.k, w.k_in[i], D, to);
        if (V::has_key) {
          if (a.k_scale)
            for (int d = 0; d < round_up(D, VL); d += VL) storeu(to + d, loadu(to + d) * w.k_scale[i]);
          KeysAt at = r.at(kv_head, 0, 0);
          at.kv_pos = t + i;
          V::transform_key(to, w.k + i * DP, at, p);
        }
        for (int d = D; d < DP; d++) w.k[i * DP + d] = 0.f;
        w.k_in[i] = i * DP;
      }
    }
    if (!DIRECT_V) {
      for (int i = 0; i < n; i++) {
        row_to_float<KV>(a.v, w.v_in[i], DV, w.v + i * DVP);
        w.v_in[i] = i * DVP;
      }
    }
    for (int i = n; i < round_up(n, VL); i++) w.k_in[i] = w.k_in[n - 1];
  }

  // The scores of ROWS rows with VL / ROWS keys.
  template <class T, int ROWS> FL_INLINE void scores(const void* k, const int64_t* in, const Row* x, float* s) {
    constexpr int KEYS = VL / ROWS;
    vf sum[VL] = {};
    for (int d = 0; d < DP; d += 2 * VL) {
      vf q[ROWS][2];
#pragma GCC unroll 4
      for (int i = 0; i < ROWS; i++) q[i][0] = loadu(x[i].q + d), q[i][1] = loadu(x[i].q + d + VL);
#pragma GCC unroll 16
      for (int j = 0; j < KEYS; j++) {
        vf u, v;
        pair<T>::load(k, in[j] + d, u, v);
#pragma GCC unroll 4
        for (int i = 0; i < ROWS; i++) sum[i * KEYS + j] += u * q[i][0], sum[i * KEYS + j] += v * q[i][1];
      }
    }
    float all[VL];
    storeu(all, sums(sum));
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; i++) __builtin_memcpy(s + i * BLOCK, all + i * KEYS, KEYS * 4);
  }
  template <int ROWS> FL_INLINE void score_rows(const Row* x, float* s, int n) {
    for (int j = 0; j < n; j += VL / ROWS) {
      if (DIRECT_K) scores<KV, ROWS>(a.k, w.k_in + j, x, s + j);
      else scores<f32, ROWS>(w.k, w.k_in + j, x, s + j);
    }
  }

  // o of ROWS rows, a chunk of dims at a time in registers
  template <class T, int ROWS> FL_INLINE void values(const void* v, Row* x, const float* s, const float* shrink, int n) {
    constexpr int PAIRS = VL == 16 ? 2 : VL == 8 && ROWS > 1 ? 1 : 1;
    for (int d = 0; d < DVP; d += 2 * VL * PAIRS) {
      vf o[ROWS][PAIRS][2];
#pragma GCC unroll 4
      for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 2
        for (int c = 0; c < PAIRS; c++) {
          if (d + c * 2 * VL >= DVP) continue;
          o[i][c][0] = loadu(x[i].o + d + c * 2 * VL) * shrink[i], o[i][c][1] = loadu(x[i].o + d + c * 2 * VL + VL) * shrink[i];
        }
      for (int j = 0; j < n; j++) {
        vf y[PAIRS][2];
#pragma GCC unroll 2
        for (int c = 0; c < PAIRS; c++)
          if (d + c * 2 * VL < DVP) pair<T>::load(v, w.v_in[j] + d + c * 2 * VL, y[c][0], y[c][1]);
#pragma GCC unroll 4
        for (int i = 0; i < ROWS; i++) {
          vf b = bc(s[i * BLOCK + j]);
#pragma GCC unroll 2
          for (int c = 0; c < PAIRS; c++) o[i][c][0] += b * y[c][0], o[i][c][1] += b * y[c][1];
        }
      }
#pragma GCC unroll 4
      for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 2
        for (int c = 0; c < PAIRS; c++) {
          if (d + c * 2 * VL >= DVP) continue;
          storeu(x[i].o + d + c * 2 * VL, o[i][c][0]), storeu(x[i].o + d + c * 2 * VL + VL, o[i][c][1]);
        }
    }
  }
  template <int ROWS> FL_INLINE void value_rows(Row* x, const float* s, const float* shrink, int n) {
    if (DIRECT_V) values<KV, ROWS>(a.v, x, s, shrink, n);
    else values<f32, ROWS>(w.v, x, s, shrink, n);
  }

  // One row's scores become weights; answers by how much what it has summed so far shrinks.
  FL_INLINE float softmax(Row& x, float* s, int32_t kv_head, int32_t row, int32_t t, int n, bool masked) {
    KeysAt at = r.at(kv_head, kv_head * G + row % G, row / G);
    auto logits = V::bind_logits(at, p);
    auto mask = V::bind_mask(at, p);
    const vf out = bc(V::softmax ? -__builtin_inff() : 0.f);
    vf best = bc(-__builtin_inff());
    for (int j = 0; j < n; j += VL) {
      vf y = loadu(s + j);
      vi kv_pos = iota() + (t + j);
      if (a.k_scale && !V::has_key) y *= loadu(w.k_scale + j);
      if (V::has_logits) y = logits(y, kv_pos);
      if (V::has_logits && V::softmax) y *= LOG2E;
      if (V::has_mask && masked) y = where(mask(kv_pos), y, out);
      if (j + VL > n) y = kv_pos < t + n ? y : out;
      storeu(s + j, y);
      best = fast_max(best, y);
    }
    float shrink = 1.f;
    if (V::softmax) {
      float m = x.m, top = max_lanes(best)[0];
      top = top > m ? top : m;
      float base = top == -__builtin_inff() ? 0.f : top;
      vf l = loadu(x.l);
      if (top != m) {
        shrink = fast_exp2(bc(m - base))[0];
        l *= shrink;
        x.m = top;
      }
      for (int j = 0; j < n; j += VL) {
        vf e = fast_exp2(loadu(s + j) - base);
        l += e;
        storeu(s + j, e);
      }
      storeu(x.l, l);
    }
    if (a.v_scale)
      for (int j = 0; j < n; j += VL) storeu(s + j, loadu(s + j) * loadu(w.v_scale + j));
    return shrink;
  }

  template <int ROWS> FL_INLINE void attend_rows(Row* x, int32_t kv_head, int32_t row, int32_t t, int n, bool masked) {
    float shrink[ROWS];
    score_rows<ROWS>(x, w.s, n);
    for (int i = 0; i < ROWS; i++) shrink[i] = softmax(x[i], w.s + i * BLOCK, kv_head, row + i, t, n, masked);
    value_rows<ROWS>(x, w.s, shrink, n);
  }

  FL_INLINE void attend(int32_t kv_head, int32_t t, int n, bool masked) {
    Row* x = w.rows + (kv_head - it.kv_head_lo) * rows;
    int i = 0;
    constexpr int MOST = VL >= 16 ? 4 : 2;
    if (G >= MOST || G == 3)
      for (; i + MOST <= rows; i += MOST) attend_rows<MOST>(x + i, kv_head, it.row_lo + i, t, n, masked);
    if (MOST > 2 && G != 1)
      for (; i + 2 <= rows; i += 2) attend_rows<2>(x + i, kv_head, it.row_lo + i, t, n, masked);
    for (; i < rows; i++) attend_rows<1>(x + i, kv_head, it.row_lo + i, t, n, masked);
  }

  // Touch the next block's lines of this head while this one is computed.
  FL_INLINE void fetch(const int64_t* k_next, const int64_t* v_next, int32_t kv_head, int n) {
    typedef typename KV::raw raw;
    for (int i = 0; i < n; i++) {
      const char *k = (const char*)((const raw*)a.k + k_next[i] + kv_head * a.k_head);
      const char *v = (const char*)((const raw*)a.v + v_next[i] + kv_head * a.v_head);
      for (int d = 0; d < D * (int)sizeof(raw); d += 64) prefetch(k + d);
      for (int d = 0; d < DV * (int)sizeof(raw); d += 64) prefetch(v + d);
    }
  }

  void run() {
    for (int32_t h = it.kv_head_lo; h < it.kv_head_hi; h++)
      for (int i = 0; i < rows; i++) load_query(w.rows[(h - it.kv_head_lo) * rows + i], h, it.row_lo + i);
    for (int32_t t = it.kv_lo; (t = next_block<C, V>(r, p, it, t, it.kv_hi)) < it.kv_hi; t += BLOCK) {
      int n = min_of(BLOCK, it.kv_hi - t);
      key_offsets(a, r, t, n, a.k_page, a.k_token, w.k_at);
      key_offsets(a, r, t, n, a.v_page, a.v_token, w.v_at);
      int next = max_of(0, min_of(BLOCK, it.kv_hi - t - BLOCK));
      int64_t k_next[BLOCK], v_next[BLOCK];
      key_offsets(a, r, t + BLOCK, next, a.k_page, a.k_token, k_next);
      key_offsets(a, r, t + BLOCK, next, a.v_page, a.v_token, v_next);
      for (int32_t h = it.kv_head_lo; h < it.kv_head_hi; h++) {
        int keep = verdict<C, V>(r, p, h, it.row_lo, it.row_hi, t, t + n);
        if (keep == 0) continue;
        fetch(k_next, v_next, h, next);
        load_keys(h, t, n);
        attend(h, t, n, keep == 1);
      }
    }
    for (int32_t h = it.kv_head_lo; h < it.kv_head_hi; h++) {
      for (int i = 0; i < rows; i++) {
        Row& x = w.rows[(h - it.kv_head_lo) * rows + i];
        if (ZIPPED_V) {
          for (int d = 0; d < DVP; d += 2 * VL) {
            vf u = loadu(x.o + d), v = loadu(x.o + d + VL);
            storeu(x.o + d, zip_lo(u, v)), storeu(x.o + d + VL, zip_hi(u, v));
          }
        }
        End::give(a, p, r, it, h, it.row_lo + i, x.o, x.m, sum_lanes(loadu(x.l))[0]);
      }
    }
    End::item(a, p, r, it);
  }
};

}  // namespace flashloom
