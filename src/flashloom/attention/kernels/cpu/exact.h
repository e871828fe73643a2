// One row from the keys that it sees, and no other: what a mask hides is not even read. Kernels multiply hidden values by 0,
// which a NaN or an infinity survives, so rows that come out as NaN are computed once more, here. Slow, and rarely called.
#pragma once
#include "args.h"

namespace flashloom {

template <class C, class V> struct Exact {
  typedef typename V::Params Params;
  static constexpr int D = C::DIM, DV = C::VALUE_DIM, DP = round_up(D, VL), DVP = round_up(DV, VL < 8 ? 8 : VL);

  const Args& a;
  const Params& p;
  const Request& r;
  const KeysAt at;
  float q[DP], k[DP], v[DVP], raw[DP];

  FL_INLINE Exact(const Args& a, const Params& p, const Request& r, int32_t kv_head, int32_t row)
      : a(a), p(p), r(r), at(r.at(kv_head, kv_head * C::GROUP + row % C::GROUP, row / C::GROUP)) {
    int64_t from = r.batch * a.q_request + (r.q_start + row / C::GROUP) * a.q_token + at.q_head * a.q_head;
    row_to_float<typename C::Q>(a.q, from, D, V::has_query ? raw : q);
    if constexpr (V::has_query) V::transform_query(raw, q, at, p);
    for (int d = D; d < DP; d++) q[d] = 0.f;
    scale(q, DP, (float)a.sm_scale * (V::softmax && !V::has_logits ? LOG2E : 1.f));
  }
  static FL_INLINE void scale(float* x, int n, float by) {
    for (int d = 0; d < n; d += VL) storeu(x + d, loadu(x + d) * by);
  }

  FL_INLINE float score(int32_t t) {
    int64_t from;
    float by = 1.f;
    key_offsets(a, r, t, 1, a.k_page, a.k_token, &from);
    if (a.k_scale) key_scales(a, r, t, 1, a.k_scale, a.k_scale_page, at.kv_head * a.k_scale_head, &by);
    row_to_float<typename C::KV>(a.k, from + at.kv_head * a.k_head, D, V::has_key ? raw : k);
    if constexpr (V::has_key) {
      if (a.k_scale) scale(raw, DP, by);
      KeysAt key = r.at(at.kv_head, 0, 0);
      key.kv_pos = t;
      V::transform_key(raw, k, key, p);
      for (int d = D; d < DP; d++) k[d] = 0.f;
    }
    vf sum{};
    for (int d = 0; d < DP; d += VL) sum += loadu(q + d) * loadu(k + d);
    return sum_lanes(sum)[0] * (V::has_key ? 1.f : by);
  }

  FL_INLINE void add_value(int32_t t, float weight, float* o) {
    int64_t from;
    key_offsets(a, r, t, 1, a.v_page, a.v_token, &from);
    row_to_float<typename C::KV>(a.v, from + at.kv_head * a.v_head, DV, v);
    if (a.v_scale) {
      float by;
      key_scales(a, r, t, 1, a.v_scale, a.v_scale_page, at.kv_head * a.v_scale_head, &by);
      scale(v, DVP, by);
    }
    for (int d = 0; d < DVP; d += VL) storeu(o + d, loadu(o + d) + loadu(v + d) * weight);
  }

  // o [DVP], m and l as a kernel would leave them.
  FL_INLINE void attend(float* o, float& m, float& l) {
    const float inf = __builtin_inff();
    auto logits = V::bind_logits(at, p);
    auto mask = V::bind_mask(at, p);
    for (int d = 0; d < DVP; d += VL) storeu(o + d, vf{}), storeu(v + d, vf{});
    m = -inf, l = 0.f;
    for (int pass = V::softmax ? 0 : 1; pass < 2; pass++) {  // the maximum first: rescaling would make NaN of an infinity
      for (int32_t t = 0; t < r.kv_len; t += VL) {
        const vi kv_pos = iota() + t;
        float seen[VL], s[VL] = {};
        vf keep = bc(1.f);
        if constexpr (V::has_mask) keep = where(mask(kv_pos), keep, vf{});
        storeu(seen, kv_pos < r.kv_len ? keep : vf{});
        bool some = false;
        for (int i = 0; i < VL; i++)
          if (seen[i] != 0.f) some = true, s[i] = score(t + i);
        if (!some) continue;
        if constexpr (V::has_logits) storeu(s, logits(loadu(s), kv_pos) * (V::softmax ? LOG2E : 1.f));
        for (int i = 0; i < VL; i++) {
          if (seen[i] == 0.f) continue;
          float weight = s[i];
          if (V::softmax && !(weight < inf)) {  // a softmax with a NaN, or of infinity less infinity
            for (int d = 0; d < DVP; d++) o[d] = __builtin_nanf("");
            m = l = o[0];
            return;
          }
          if (pass == 0) {
            m = max_of(m, weight);
            continue;
          }
          if constexpr (V::softmax) {  // what is too small for float32 is more than nothing to an infinite value
            weight = weight == -inf ? 0.f : max_of(fast_exp2(bc(weight - m))[0], 0x1p-126f);
            l += weight;
          }
          add_value(t + i, weight, o);
        }
      }
    }
  }

  static FL_COLD void row(const Args& a, const Params& p, const Request& r, int32_t kv_head, int32_t row, float* o, float& m,
                          float& l) {
    Exact(a, p, r, kv_head, row).attend(o, m, l);
  }
};

}  // namespace flashloom
