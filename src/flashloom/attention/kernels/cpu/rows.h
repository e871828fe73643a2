// Many rows: lanes are rows. S^T = K Q^T and O^T = V^T P^T, so keys and values are read element by element as they lie, the
// softmax has no horizontal operations, and nothing but the queries and outputs is transposed.
//
// A block of keys and values becomes float32 in scratch once and serves all rows of the item, SUB rows at a time, with
// register blocks of 6 keys (or value dims) x LANES vectors: the most that leaves registers for the operands. Everything may
// be odd: dims, page sizes, dtypes, alignment.
#pragma once
#include "finish.h"

namespace flashloom {

template <class C, class V> struct RowsKernel {
  typedef typename V::Params Params;
  typedef Finish<C, V> End;
  static constexpr int D = C::DIM, DV = C::VALUE_DIM, G = C::GROUP;
#if defined(FL_AVX512) || defined(__aarch64__)
  static constexpr int LANES = 4;  // 24 of 32 registers accumulate
#else
  static constexpr int LANES = 2;  // 12 of 16
#endif
  static constexpr int KEYS = 6, DIMS = 4;
  static constexpr int DP = round_up(D, VL), DVP = End::DVP;
  static constexpr int KS = DP + VL, VS = DVP + VL;  // floats from key to key: not a power of two, which would alias
  static constexpr int SUB = LANES * VL;  // rows that share registers
  static constexpr int BLOCK = 60;        // keys in scratch
  static constexpr int MAX_ROWS = 512;    // rows that share a block of keys

  struct Sub {
    float q[DP * SUB];   // [dim][row], times sm_scale (and log2 e where nothing comes between)
    float o[DVP * SUB];  // [dim][row]
    float m[SUB], l[SUB];
  };
  struct Scratch {
    float k[BLOCK * KS], v[BLOCK * VS];  // [key][dim]
    float s[BLOCK * SUB];                 // [key][row]
    float row[VL * (DP > DVP ? DP : DVP)], transformed[DP];
    int64_t k_at[BLOCK], v_at[BLOCK];
    float scale[BLOCK];
    alignas(64) Sub sub[1];  // as many as the item has
  };
  static int64_t most_rows(int64_t) { return MAX_ROWS; }
  static int64_t scratch_size(int64_t rows, int64_t) { return sizeof(Scratch) + (rows - 1) / SUB * (int64_t)sizeof(Sub); }

  const Args& a;
  const Params& p;
  Scratch& w;
  const Item& it;
  Request r;

  RowsKernel(const Args& a, const Params& p, char* scratch, const Item& it)
      : a(a), p(p), w(*(Scratch*)scratch), it(it), r(a, it.request) {}

  RowsAt at(int32_t kv_head, int32_t first) const {
    RowsAt x = {r.batch, kv_head, r.q_len, r.kv_len, r.q_start, r.kv_start, vi{}, vi{}};
    for (int i = 0; i < VL; i++) {
      int32_t row = min_of(first + i, it.row_hi - 1);
      x.q_head[i] = kv_head * G + row % G;
      x.q_pos[i] = r.kv_len - r.q_len + row / G;
    }
    return x;
  }

  FL_OUTLINE void load_query(Sub& s, int32_t kv_head, int32_t first) {
    float scale = (float)a.sm_scale * (V::softmax && !V::has_logits ? LOG2E : 1.f);
    for (int half = 0; half < SUB; half += VL) {
      for (int i = 0; i < VL; i++) {
        int32_t row = min_of(first + half + i, it.row_hi - 1), q_head = kv_head * G + row % G;
        int64_t from = r.batch * a.q_request + (r.q_start + row / G) * a.q_token + q_head * a.q_head;
        float* to = w.row + i * DP;
        row_to_float<typename C::Q>(a.q, from, D, V::has_query ? w.transformed : to);
        if constexpr (V::has_query) V::transform_query(w.transformed, to, r.at(kv_head, q_head, row / G), p);
      }
      for (int d = 0; d < VL * DP; d += VL) storeu(w.row + d, loadu(w.row + d) * scale);
      for (int d = 0; d < D; d += VL) {
        transpose_block(w.row + d, DP, s.q + d * SUB + half, SUB);
      }
    }
    for (int d = 0; d < DVP * SUB; d += VL) storeu(s.o + d, vf{});
    for (int i = 0; i < SUB; i += VL) storeu(s.m + i, bc(-__builtin_inff())), storeu(s.l + i, vf{});
  }

  FL_OUTLINE void load_keys(int32_t kv_head, int32_t t, int n) {
    key_offsets(a, r, t, n, a.k_page, a.k_token, w.k_at);
    key_offsets(a, r, t, n, a.v_page, a.v_token, w.v_at);
    if (a.k_scale) key_scales(a, r, t, n, a.k_scale, a.k_scale_page, kv_head * a.k_scale_head, w.scale);
    for (int i = 0; i < n; i++) {
      float* to = V::has_key ? w.transformed : w.k + i * KS;
      row_to_float<typename C::KV>(a.k, w.k_at[i] + kv_head * a.k_head, D, to);
      if (a.k_scale)
        for (int d = 0; d < DP; d += VL) storeu(to + d, loadu(to + d) * w.scale[i]);
      if constexpr (V::has_key) {
        KeysAt at = r.at(kv_head, 0, 0);
        at.kv_pos = t + i;
        V::transform_key(to, w.k + i * KS, at, p);
      }
    }
    if (a.v_scale) key_scales(a, r, t, n, a.v_scale, a.v_scale_page, kv_head * a.v_scale_head, w.scale);
    for (int i = 0; i < n; i++) {
      float* to = w.v + i * VS;
      row_to_float<typename C::KV>(a.v, w.v_at[i] + kv_head * a.v_head, DV, to);
      if (a.v_scale)
        for (int d = 0; d < DV; d += VL) storeu(to + d, loadu(to + d) * w.scale[i]);
    }
  }

  // s [KEYS keys][rows] = k q
  template <int N> static FL_OUTLINE void scores(const float* k, const float* q, float* s) {
    vf x[KEYS][N] = {};
    for (int d = 0; d < D; d++) {
      vf y[N];
#pragma GCC unroll 4
      for (int j = 0; j < N; j++) y[j] = loadu(q + d * SUB + j * VL);
#pragma GCC unroll 6
      for (int i = 0; i < KEYS; i++) {
        vf b = bc(k[i * KS + d]);
#pragma GCC unroll 4
        for (int j = 0; j < N; j++) x[i][j] += b * y[j];
      }
    }
#pragma GCC unroll 6
    for (int i = 0; i < KEYS; i++)
#pragma GCC unroll 4
      for (int j = 0; j < N; j++) storeu(s + i * SUB + j * VL, x[i][j]);
  }

  // o [M dims][rows] += sum over n keys of v[key][dims] p[key][rows]
  template <int M, int N> static FL_OUTLINE void values(const float* v, const float* s, float* o, int n) {
    vf x[M][N];
#pragma GCC unroll 6
    for (int i = 0; i < M; i++)
#pragma GCC unroll 4
      for (int j = 0; j < N; j++) x[i][j] = loadu(o + i * SUB + j * VL);
    for (const float* end = v + (int64_t)n * VS; v != end; v += VS, s += SUB) {
      vf y[N];
#pragma GCC unroll 4
      for (int j = 0; j < N; j++) y[j] = loadu(s + j * VL);
#pragma GCC unroll 6
      for (int i = 0; i < M; i++) {
        vf b = bc(v[i]);
#pragma GCC unroll 4
        for (int j = 0; j < N; j++) x[i][j] += b * y[j];
      }
    }
#pragma GCC unroll 6
    for (int i = 0; i < M; i++)
#pragma GCC unroll 4
      for (int j = 0; j < N; j++) storeu(o + i * SUB + j * VL, x[i][j]);
  }
  template <int N> FL_INLINE void all_scores(const Sub& u, int n) {
    for (int j = 0; j < n; j += KEYS) scores<N>(w.k + j * KS, u.q, w.s + j * SUB);
  }
  template <int N> FL_INLINE void all_values(Sub& u, int n) {
    constexpr int END = round_up(DV, DIMS);
    int d = 0;  // so many blocks of KEYS dims, and the rest in blocks of DIMS
    for (; (END - d) % KEYS; d += DIMS) values<DIMS, N>(w.v + d, w.s, u.o + d * SUB, n);
    for (; d < END; d += KEYS) values<KEYS, N>(w.v + d, w.s, u.o + d * SUB, n);
  }

  // Hooks on the scores of VL rows over n keys; answers their maximum.
  FL_OUTLINE vf hooks(float* s, int32_t kv_head, int32_t first, int32_t t, int n, bool masked) {
    const vf out = bc(V::softmax ? -__builtin_inff() : 0.f);
    vf best = bc(-__builtin_inff());
    if (!V::has_logits && !(V::has_mask && masked)) {
      if (!V::softmax) return best;
      for (int64_t j = 0; j < n; j++) best = fast_max(best, loadu(s + j * SUB));
      return best;
    }
    RowsAt x = at(kv_head, first);
    auto logits = V::bind_logits(x, p);
    auto mask = V::bind_mask(x, p);
    for (int j = 0; j < n; j++) {
      vf y = loadu(s + j * SUB);
      if (V::has_logits) y = logits(y, t + j);
      if (V::has_logits && V::softmax) y *= LOG2E;
      if (V::has_mask && masked) y = where(mask(t + j), y, out);
      storeu(s + j * SUB, y);
      best = fast_max(best, y);
    }
    return best;
  }

  FL_OUTLINE void sub_block(Sub& u, int32_t kv_head, int32_t first, int32_t t, int n, bool masked) {
    const int rows = min_of(SUB, it.row_hi - first);
    if (LANES > 2 && rows <= 2 * VL) all_scores<2>(u, n);
    else all_scores<LANES>(u, n);
    for (int half = 0; half < rows; half += VL) {
      float* s = w.s + half;
      vf best = hooks(s, kv_head, first + half, t, n, masked);
      if (!V::softmax) continue;
      vf m = loadu(u.m + half), top = fast_max(m, best), base = top == -__builtin_inff() ? vf{} : top;
      if (any(top != m)) {
        vf shrink = fast_exp2(m - base);
        storeu(u.m + half, top), storeu(u.l + half, loadu(u.l + half) * shrink);
        for (int d = 0; d < DVP; d++) storeu(u.o + d * SUB + half, loadu(u.o + d * SUB + half) * shrink);
      }
      vf l = loadu(u.l + half);
      for (int64_t j = 0; j < n; j++) {
        vf e = fast_exp2(loadu(s + j * SUB) - base);
        storeu(s + j * SUB, e);
        l += e;
      }
      storeu(u.l + half, l);
    }
    if (LANES > 2 && rows <= 2 * VL) all_values<2>(u, n);
    else all_values<LANES>(u, n);
  }

  FL_OUTLINE void give(Sub& u, int32_t kv_head, int32_t first) {
    for (int half = 0; half < SUB && first + half < it.row_hi; half += VL) {
      for (int d = 0; d < DVP; d += VL) {
        transpose_block(u.o + d * SUB + half, SUB, w.row + d, DVP);
      }
      for (int i = 0; i < min_of(VL, it.row_hi - first - half); i++)
        End::give(a, p, r, it, kv_head, first + half + i, w.row + i * DVP, u.m[half + i], u.l[half + i]);
    }
  }

  void run() {
    int subs = (it.row_hi - it.row_lo + SUB - 1) / SUB;
    for (int32_t h = it.kv_head_lo; h < it.kv_head_hi; h++) {
      Item one = it;
      one.kv_head_lo = h, one.kv_head_hi = h + 1;
      for (int i = 0; i < subs; i++) load_query(w.sub[i], h, it.row_lo + i * SUB);
      for (int32_t t = it.kv_lo; (t = next_block<C, V>(r, p, one, t, it.kv_hi)) < it.kv_hi; t += BLOCK) {
        int n = min_of(BLOCK, it.kv_hi - t);
        int whole = verdict<C, V>(r, p, h, it.row_lo, it.row_hi, t, t + n);
        if (whole == 0) continue;
        load_keys(h, t, n);
        for (int i = 0; i < subs; i++) {
          int32_t first = it.row_lo + i * SUB, last = min_of(first + SUB, it.row_hi);
          int keep = whole == 2 ? 2 : verdict<C, V>(r, p, h, first, last, t, t + n);
          if (keep) sub_block(w.sub[i], h, first, t, n, keep == 1);
        }
      }
      for (int i = 0; i < subs; i++) give(w.sub[i], h, it.row_lo + i * SUB);
    }
    End::item(a, p, r, it);
  }
};

}  // namespace flashloom
