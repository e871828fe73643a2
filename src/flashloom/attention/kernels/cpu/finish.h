// The end of a row: normalise, output_transform, store; and the merge of the pieces of a row that was split over keys.
#pragma once
#include "exact.h"

namespace flashloom {

template <class C, class V> struct Finish {
  typedef typename V::Params Params;
  static constexpr int DV = C::VALUE_DIM, DVP = round_up(DV, VL < 8 ? 8 : VL);
  static constexpr int PARTIAL = DVP + VL;  // floats of a row's partial result: o, maximum (log2), sum

  // Divides o [DVP] by the sum of the weights; answers the lse.
  static FL_INLINE float normalise(bool empty, float* o, float m, float l) {
    if (!empty && !V::softmax) return -__builtin_inff();
    const float scale = empty ? 0.f : 1.f / l;
    for (int d = 0; d < DVP; d += VL) storeu(o + d, empty ? vf{} : loadu(o + d) * scale);
    return empty ? -__builtin_inff() : (m + log2(l)) * LN2;
  }
  static FL_INLINE bool is_empty(const Request& r, float l) {
    return r.kv_len == 0 || (V::softmax && l == 0.f);  // not by m, which a NaN leaves at -inf
  }

  // o [DVP] is the weighted sum of the values; m the maximum in log2 units, l the sum of the weights.
  static FL_OUTLINE void row(const Args& a, const Params& p, const Request& r, int32_t kv_head, int32_t row, float* o,
                            float m, float l) {
    int32_t token = row / C::GROUP, q_head = kv_head * C::GROUP + row % C::GROUP;
    float lse = normalise(is_empty(r, l), o, m, l);
    if constexpr (V::has_mask) {
      vi bad{};
      for (int d = 0; d < DVP; d += VL) bad |= loadu(o + d) != loadu(o + d);
      if (__builtin_expect(any(bad), 0)) {
        Exact<C, V>::row(a, p, r, kv_head, row, o, m, l);
        lse = normalise(is_empty(r, l), o, m, l);
      }
    }
    if constexpr (V::has_output)
      if (!a.partial && !is_empty(r, l)) V::transform_output(o, lse, r.at(kv_head, q_head, token), p);
    int64_t at = r.q_start + token;
    store_row(a, r.batch * a.out_request + at * a.out_token + q_head * a.out_head, o, DV);
    if (V::softmax && a.lse) a.lse[r.batch * a.lse_request + at * a.lse_token + q_head * a.lse_head] = lse;
  }

  static FL_INLINE float* partial(const Args& a, const Item& it, int split, int32_t kv_head, int32_t row) {
    int64_t heads = it.kv_head_hi - it.kv_head_lo, rows = it.row_hi - it.row_lo;
    return a.workspace + it.partial + ((split * heads + kv_head - it.kv_head_lo) * rows + row - it.row_lo) * PARTIAL;
  }

  // One row of an item is done: the result, or a piece of it.
  static FL_OUTLINE void give(const Args& a, const Params& p, const Request& r, const Item& it, int32_t kv_head,
                             int32_t at_row, float* o, float m, float l) {
    if (it.splits == 1) {
      row(a, p, r, kv_head, at_row, o, m, l);
      return;
    }
    float* to = partial(a, it, it.split, kv_head, at_row);
    for (int d = 0; d < DVP; d += VL) storeu(to + d, loadu(o + d));
    to[DVP] = m, to[DVP + 1] = l;
  }

  // The same for all rows of an item that has seen no key (softmax; it is one of several pieces).
  static FL_OUTLINE void give_nothing(const Args& a, const Item& it) {
    for (int32_t h = it.kv_head_lo; h < it.kv_head_hi; h++)
      for (int32_t i = it.row_lo; i < it.row_hi; i++) {
        float* to = partial(a, it, it.split, h, i);
        to[DVP] = -__builtin_inff(), to[DVP + 1] = 0.f;
      }
  }

  // Called once an item has given all its rows. Whoever comes last adds the pieces up, in their order.
  static FL_OUTLINE void item(const Args& a, const Params& p, const Request& r, const Item& it) {
    if (it.splits == 1) return;
    int32_t* counter = a.counters + it.merge;
    if (__atomic_add_fetch(counter, 1, __ATOMIC_ACQ_REL) < it.splits) return;
    __atomic_store_n(counter, 0, __ATOMIC_RELAXED);
    for (int32_t h = it.kv_head_lo; h < it.kv_head_hi; h++) {
      for (int32_t i = it.row_lo; i < it.row_hi; i++) {
        int first = 0;  // piece that has seen a key
        while (V::softmax && first + 1 < it.splits && partial(a, it, first, h, i)[DVP + 1] == 0.f) first++;
        float* o = partial(a, it, first, h, i);
        float m = o[DVP], l = o[DVP + 1];
        for (int s = first + 1; s < it.splits; s++) {
          const float* x = partial(a, it, s, h, i);
          float mine = 1.f, other = 1.f;
          if (V::softmax) {
            if (x[DVP + 1] == 0.f) continue;
            float top = x[DVP] > m ? x[DVP] : m;
            mine = fast_exp2(bc(m - top))[0], other = fast_exp2(bc(x[DVP] - top))[0];
            m = top, l = l * mine + x[DVP + 1] * other;
          }
          for (int d = 0; d < DVP; d += VL) storeu(o + d, loadu(o + d) * mine + loadu(x + d) * other);
        }
        row(a, p, r, h, i, o, m, l);
      }
    }
  }
};

// Which keys of an item to look at: 0 none, 1 test each, 2 all, for rows [lo, hi] of one head.
template <class C, class V> FL_OUTLINE int verdict_of(const Request& r, const typename V::Params& p, int32_t kv_head, int32_t lo,
                                                  int32_t hi, int32_t kv_lo, int32_t kv_hi) {
  int32_t first = lo / C::GROUP, last = (hi - 1) / C::GROUP, head = kv_head * C::GROUP;
  bool one = first == last;  // rows of one token may be some of its heads only
  Tile t = {r.batch, kv_head, one ? head + lo % C::GROUP : head, one ? head + (hi - 1) % C::GROUP : head + C::GROUP - 1,
            r.kv_len - r.q_len + first, r.kv_len - r.q_len + last, kv_lo, kv_hi - 1, r.q_len, r.kv_len, r.q_start, r.kv_start};
  return V::verdict(t, p);
}

template <class C, class V> FL_INLINE int verdict(const Request& r, const typename V::Params& p, int32_t kv_head, int32_t lo,
                                                  int32_t hi, int32_t kv_lo, int32_t kv_hi) {
  if constexpr (V::has_mask) return verdict_of<C, V>(r, p, kv_head, lo, hi, kv_lo, kv_hi);
  return 2;
}

// Skips keys from t in large steps where no head of the item keeps any; answers the next block's start, or `end`.
template <class C, class V> FL_INLINE int32_t next_block(const Request& r, const typename V::Params& p, const Item& it,
                                                         int32_t t, int32_t end) {
  constexpr int32_t STEP = 1024;
  if constexpr (!V::has_mask) return t;
  while (t < end && t % STEP == 0) {
    int32_t to = min_of(t + STEP, end);
    for (int32_t h = it.kv_head_lo; h < it.kv_head_hi; h++)
      if (verdict<C, V>(r, p, h, it.row_lo, it.row_hi, t, to)) return t;
    t = to;
  }
  return t;
}

}  // namespace flashloom
