// Elementary functions on vectors, accurate to about 2 ulp over the whole float range (infinities and NaN included), but for
// tanh and sigmoid where the kernel says FL_COARSE.
//
// The polynomials are minimax fits made for this file (reweighted least squares on Chebyshev nodes); each comment gives
// the interval and the fit's relative error.
#pragma once
#include "vec.h"

namespace flashloom {

FL_INLINE vf vabs(vf x) { return (vf)((vi)x & 0x7fffffff); }
FL_INLINE vf copy_sign(vf size, vf sign) { return (vf)(((vi)size & 0x7fffffff) | ((vu)sign & 0x80000000u)); }
FL_INLINE vf round_even(vf x) { return (x + 12582912.f) - 12582912.f; }  // |x| < 2^22
FL_INLINE vf vclamp(vf x, float lo, float hi) { return fast_min(bc(hi), fast_max(bc(lo), x)); }  // NaN stays NaN

// p * 2^n for n an integral float in [-300, 300]: in two factors, so that subnormal results round once
FL_INLINE vf scale2(vf p, vf n) {
  vi k = __builtin_convertvector(n, vi), h = k >> 1;
  vf a = (vf)((h + 127) << 23), b = (vf)((k - h + 127) << 23);
  return p * a * b;
}

FL_INLINE vf exp2_poly(vf f) {  // 2^f on [-.5, .5], 1.9e-9
  vf p = bc(1.534581159e-04f);
  p = p * f + 1.339993121e-03f;
  p = p * f + 9.618488959e-03f;
  p = p * f + 5.550328777e-02f;
  p = p * f + 2.402264689e-01f;
  p = p * f + 6.931472057e-01f;
  return p * f + 1.f;
}
FL_INLINE vf expm1_poly(vf r) {  // e^r - 1 on [-ln2/2, ln2/2], 1.1e-8
  vf p = bc(1.394859514e-03f);
  p = p * r + 8.369157849e-03f;
  p = p * r + 4.166624050e-02f;
  p = p * r + 1.666650517e-01f;
  p = p * r + 5.000000081e-01f;
  return r + r * r * p;
}

FL_INLINE vf vexp2(vf x) {
  x = vclamp(x, -151.f, 129.f);
  vf n = round_even(x);
  vf p = exp2_poly(x - n);
  return x == x ? scale2(p, n) : x;
}

FL_INLINE vf ln2_reduce(vf x, vf n) { return (x - n * 0.693359375f) - n * -2.12194440e-4f; }

FL_INLINE vf vexp(vf x) {
  x = vclamp(x, -105.f, 90.f);
  vf n = round_even(x * 1.44269504f);
  vf p = 1.f + expm1_poly(ln2_reduce(x, n));
  return x == x ? scale2(p, n) : x;
}

#if defined(FL_COARSE) && defined(FL_AVX512)
// For kernels of 16-bit queries: 1 / (1 + 2^x) to 3e-6 of its value, without a division.
FL_INLINE vf logistic2(vf x) {
  vf f, e, r;
  x = fast_min(bc(60.f), x);
  asm("vreduceps $9, %1, %0" : "=v"(f) : "v"(x));  // x - floor(x)
  vf p = bc(1.353416778e-2f);  // 2^f on [0, 1], 2.6e-6
  p = p * f + 5.201146007e-2f;
  p = p * f + 2.414427549e-1f;
  p = p * f + 6.930038333e-1f;
  p = p * f + 1.000002623f;
  asm("vscalefps %2, %1, %0" : "=v"(e) : "v"(p), "v"(x));
  vf d = e + 1.f;
  asm("vrcp14ps %1, %0" : "=v"(r) : "v"(d));
  return r + r * (1.f - d * r);
}
FL_INLINE bool any_above_half(vf x) {  // or NaN
  bool r;
  asm("vcmpps $22, %2, %1, %%k1\n\tkortestw %%k1, %%k1" : "=@ccnz"(r) : "v"(x), "v"(bc(.5f)) : "k1");
  return r;
}
FL_INLINE vf tanh_poly(vf x, vf z) {  // z = x^2 <= 1/2
  vf p = bc(-3.544105434e-02f);
  p = p * z + 1.270844989e-01f;
  p = p * z - 3.325152441e-01f;
  p = p * z + 9.999706399e-01f;
  return p * x;
}
FL_INLINE vf tanh_any(vf x) { return 1.f - 2.f * logistic2(x * 2.88539008f); }
// To an absolute error of 3e-6. Capped logits are mostly well below the cap, where a short polynomial serves.
FL_INLINE vf vtanh(vf x) {
  vf z = x * x;
  return __builtin_expect(any_above_half(z), 0) ? tanh_any(x) : tanh_poly(x, z);
}
FL_INLINE void tanh_pair(vf& x, vf& y) {
  vf z = x * x, w = y * y;
  if (__builtin_expect(any_above_half(fast_max(z, w)), 0)) {
    x = tanh_any(x), y = tanh_any(y);
  } else {
    x = tanh_poly(x, z), y = tanh_poly(y, w);
  }
}
FL_INLINE vf vsigmoid(vf x) { return logistic2(x * -1.44269504f); }
#else
// tanh x = m / (m + 2) with m = e^2x - 1, accurate near 0 because m is
FL_INLINE vf vtanh(vf x) {
  vf y = vclamp(x + x, -20.f, 20.f);
  vf n = round_even(y * 1.44269504f);
  vf s = (vf)(((__builtin_convertvector(n, vi)) + 127) << 23);
  vf m = s * expm1_poly(ln2_reduce(y, n)) + (s - 1.f);
  vf r = m / (m + 2.f);
  r = vabs(x) < 1e-4f ? x : r;
  return x == x ? r : x;
}

FL_INLINE void tanh_pair(vf& x, vf& y) { x = vtanh(x), y = vtanh(y); }

FL_INLINE vf vsigmoid(vf x) {
  vf e = vexp(-vabs(x));
  vf r = (x < 0.f ? e : bc(1.f)) / (1.f + e);
  return x == x ? r : x;
}
#endif

// mantissa in [sqrt 1/2, sqrt 2) and exponent; x positive and finite
FL_INLINE vf split_exponent(vf x, vf& exponent) {
  vi tiny = x < 0x1p-126f;
  vf y = tiny ? x * 0x1p24f : x;
  vi u = (vi)y - 0x3f3504f3;  // bits of sqrt(1/2)
  vi k = u >> 23;
  exponent = __builtin_convertvector(k + (tiny & -24), vf);
  return (vf)((vi)y - (k << 23));
}
FL_INLINE vf log1p_tail(vf f) {  // log(1 + f) - f on [sqrt(1/2) - 1, sqrt 2 - 1]; the cubic factor to 6e-9
  vf p = bc(-7.859611510e-02f);
  p = p * f + 1.288164749e-01f;
  p = p * f - 1.312875480e-01f;
  p = p * f + 1.418119194e-01f;
  p = p * f - 1.662455404e-01f;
  p = p * f + 2.000228627e-01f;
  p = p * f - 2.500081041e-01f;
  p = p * f + 3.333331673e-01f;
  return f * f * (f * p - 0.5f);
}
FL_INLINE vf log_edges(vf x, vf r) {
  const float inf = __builtin_inff();
  r = x == inf ? bc(inf) : r;
  r = x == 0.f ? bc(-inf) : r;
  r = x < 0.f ? bc(__builtin_nanf("")) : r;
  return x == x ? r : x;
}
FL_INLINE vf vlog(vf x) {
  vf e, f = split_exponent(x, e) - 1.f;
  vf tail = log1p_tail(f) + e * -2.12194440e-4f;
  return log_edges(x, (f + tail) + e * 0.693359375f);
}
FL_INLINE vf vlog2(vf x) {
  vf e, f = split_exponent(x, e) - 1.f;
  vf tail = log1p_tail(f);
  // times log2(e) = 1 + 0.4427: the exact part f + e is added last
  vf low = tail * 0.442695041f + f * 0.442695041f + tail;
  return log_edges(x, (low + f) + e);
}

FL_INLINE vf verf(vf x) {
  vf a = vabs(x), z = x * x;
  vf p = bc(7.889122816e-05f);  // erf(x) / x in x^2 on [0, 1], 1.2e-9
  p = p * z - 8.020842262e-04f;
  p = p * z + 5.189535450e-03f;
  p = p * z - 2.685444465e-02f;
  p = p * z + 1.128360018e-01f;
  p = p * z - 3.761262714e-01f;
  p = p * z + 1.128379166e+00f;
  vf b = fast_min(a, bc(4.f));
  vf q = bc(3.130299901e-05f);  // -log2 erfc(x) on [1, 4]
  q = q * b - 6.369098672e-04f;
  q = q * b + 6.066940523e-03f;
  q = q * b - 3.637082344e-02f;
  q = q * b + 1.564200103e-01f;
  q = q * b + 9.135381708e-01f;
  q = q * b + 1.629639905e+00f;
  q = q * b - 2.718996653e-04f;
  vf r = a < 1.f ? x * p : copy_sign(1.f - vexp2(-q), x);
  return x == x ? r : x;
}

// Reduced in double, so that arguments to 1e6 and far beyond keep full accuracy: x = n pi/2 + r, |r| <= pi/4.
FL_INLINE vfh reduce_half(vfh x, vih& quadrant) {
  vd d = __builtin_convertvector(x, vd);
  vd t = d * 0.63661977236758134308 + 6755399441055744.0, n = t - 6755399441055744.0;
  vq k = (vq)t;  // low bits of the sum are the integer, as in fast_exp2
  quadrant = __builtin_convertvector(k & 3, vih);
  vd r = (d - n * 1.57079632673412561417) - n * 6.07710050650619224932e-11;
  vd bound = bcd(0.7853982);
  r = r > bound ? bound : r;  // beyond 2^51 there is no information left; the result stays within [-1, 1]
  r = r < -bound ? -bound : r;
  return __builtin_convertvector(r, vfh);
}
FL_INLINE vf sin_quadrant(vf x, int shift) {
  vih qa, qb;
  vf r = join(reduce_half(lo_half(x), qa), reduce_half(hi_half(x), qb));
  vi q = (join(qa, qb) + shift) & 3;
  vf z = r * r;
  vf s = r + r * z * (-1.666666466e-01f + z * (8.332747835e-03f + z * -1.958775731e-04f));  // 2.0e-8
  vf c = 1.f - 0.5f * z + z * z * (4.166666466e-02f + z * (-1.388830248e-03f + z * 2.454778842e-05f));  // 2.0e-9
  vf y = (q & 1) != 0 ? c : s;
  y = (vf)((vi)y ^ ((q & 2) << 30));
  return vabs(x) < __builtin_inff() ? y : x - x;  // infinities and NaN give NaN
}
FL_INLINE vf vsin(vf x) { return sin_quadrant(x, 0); }
FL_INLINE vf vcos(vf x) { return sin_quadrant(x, 1); }

FL_INLINE vf vtrunc(vf x) {
  vf t = copy_sign(__builtin_convertvector(__builtin_convertvector(x, vi), vf), x);
  return vabs(x) < 8388608.f ? t : x;  // larger ones are integers already; NaN and infinities pass
}
FL_INLINE vf vfloor(vf x) {
  vf t = vtrunc(x);
  return t > x ? t - 1.f : t;
}

}  // namespace flashloom
