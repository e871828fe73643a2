// Vectors of the target's own width, through the vector extensions of GCC and Clang.
//
// One text serves AVX-512, AVX2, SSE2, NEON and plain C++: arithmetic, comparison and selection are operators; only what
// the extensions cannot say well (min/max, conversions of narrow types, square roots, tiles) is one line of assembly per
// ISA. Neither immintrin.h (0.4 s of each compile) nor the C++ library is included.
#pragma once
#include <stddef.h>
#include <stdint.h>

#define FL_INLINE inline __attribute__((always_inline))
#define FL_OUTLINE inline __attribute__((noinline))  // one copy: compile time is a kernel's time, too
#define FL_COLD inline __attribute__((noinline, cold))  // once per plan: compiled for size

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define FL_AVX512 1
#define FL_WIDTH 16
#define FL_REG "v"
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define FL_AVX2 1
#define FL_WIDTH 8
#define FL_REG "x"
#else
#define FL_WIDTH 4
#define FL_REG "x"
#endif

namespace flashloom {

constexpr int VL = FL_WIDTH;  // lanes of 32 bits

typedef float vf __attribute__((vector_size(VL * 4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
typedef uint32_t vu __attribute__((vector_size(VL * 4)));
typedef uint16_t vh __attribute__((vector_size(VL * 2)));  // VL 16-bit words: bfloat16, float16
typedef int64_t vq __attribute__((vector_size(VL * 4)));   // half the lanes of a vl
typedef double vd __attribute__((vector_size(VL * 4)));    // half the lanes, in double
typedef float vfh __attribute__((vector_size(VL * 2)));    // half the lanes
typedef int32_t vih __attribute__((vector_size(VL * 2)));

struct vl { vq lo, hi; };  // VL lanes of 64 bits
struct vw { vd lo, hi; };  // VL lanes of double

// A mask of VL lanes, 0 or -1. Its own type, so that to_int32(mask) is 0/1 while to_int32(vi) is the identity.
struct vm {
  vi m;
  vm() = default;
  FL_INLINE vm(vi x) : m(x) {}
  FL_INLINE operator vi() const { return m; }
};

typedef float vf_u __attribute__((vector_size(VL * 4), aligned(1), may_alias));
typedef int32_t vi_u __attribute__((vector_size(VL * 4), aligned(1), may_alias));
typedef int64_t vq_u __attribute__((vector_size(VL * 4), aligned(1), may_alias));
typedef double vd_u __attribute__((vector_size(VL * 4), aligned(1), may_alias));
typedef uint16_t vh_u __attribute__((vector_size(VL * 2), aligned(1), may_alias));

FL_INLINE vf bc(float x) { return x - vf{}; }
FL_INLINE vi bc(int32_t x) { return x - vi{}; }
FL_INLINE vq bcq(int64_t x) { return x - vq{}; }
FL_INLINE vd bcd(double x) { return x - vd{}; }
FL_INLINE vf loadu(const float* p) { return *(const vf_u*)p; }
FL_INLINE void storeu(float* p, vf x) { *(vf_u*)p = x; }

FL_INLINE vi iota() {
#if FL_WIDTH == 16
  return vi{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif FL_WIDTH == 8
  return vi{0, 1, 2, 3, 4, 5, 6, 7};
#else
  return vi{0, 1, 2, 3};
#endif
}

// Halves and their join.
#if FL_WIDTH == 16
#define FL_LO 0, 1, 2, 3, 4, 5, 6, 7
#define FL_HI 8, 9, 10, 11, 12, 13, 14, 15
#elif FL_WIDTH == 8
#define FL_LO 0, 1, 2, 3
#define FL_HI 4, 5, 6, 7
#else
#define FL_LO 0, 1
#define FL_HI 2, 3
#endif
FL_INLINE vfh lo_half(vf x) { return __builtin_shufflevector(x, x, FL_LO); }
FL_INLINE vfh hi_half(vf x) { return __builtin_shufflevector(x, x, FL_HI); }
FL_INLINE vih lo_half(vi x) { return __builtin_shufflevector(x, x, FL_LO); }
FL_INLINE vih hi_half(vi x) { return __builtin_shufflevector(x, x, FL_HI); }
FL_INLINE vf join(vfh a, vfh b) { return __builtin_shufflevector(a, b, FL_LO, FL_HI); }
FL_INLINE vi join(vih a, vih b) { return __builtin_shufflevector(a, b, FL_LO, FL_HI); }

// max and min that compile to one instruction; where a lane is NaN the second operand is returned (as maxps does).
FL_INLINE vf fast_max(vf a, vf b) {
#if defined(FL_AVX512) || defined(FL_AVX2)
  vf r;
  asm("vmaxps %2, %1, %0" : "=" FL_REG(r) : FL_REG(a), FL_REG(b));
  return r;
#elif defined(__SSE2__)
  asm("maxps %1, %0" : "+x"(a) : "x"(b));
  return a;
#else
  return a > b ? a : b;
#endif
}
FL_INLINE vf fast_min(vf a, vf b) {
#if defined(FL_AVX512) || defined(FL_AVX2)
  vf r;
  asm("vminps %2, %1, %0" : "=" FL_REG(r) : FL_REG(a), FL_REG(b));
  return r;
#elif defined(__SSE2__)
  asm("minps %1, %0" : "+x"(a) : "x"(b));
  return a;
#else
  return a < b ? a : b;
#endif
}

FL_INLINE vf vsqrt(vf x) {
#if defined(FL_AVX512) || defined(FL_AVX2)
  vf r;
  asm("vsqrtps %1, %0" : "=" FL_REG(r) : FL_REG(x));
  return r;
#elif defined(__SSE2__)
  vf r;
  asm("sqrtps %1, %0" : "=x"(r) : "x"(x));
  return r;
#else
  for (int i = 0; i < VL; i++) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

// Is any lane set?
FL_INLINE bool any(vi m) {
#if defined(FL_AVX512)
  bool r;
  asm("vptestmd %1, %1, %%k1\n\tkortestw %%k1, %%k1" : "=@ccnz"(r) : "v"(m) : "k1");
  return r;
#elif defined(FL_AVX2)
  bool r;
  asm("vptest %1, %1" : "=@ccnz"(r) : "x"(m));
  return r;
#else
  typedef uint64_t pair __attribute__((vector_size(16)));
  pair p = (pair)m;
  return (p[0] | p[1]) != 0;
#endif
}

// The sum, and the largest, of all lanes, in every lane.
FL_INLINE vf sum_lanes(vf x) {
#pragma GCC unroll 4
  for (int w = 1; w < VL; w *= 2) x += __builtin_shuffle(x, iota() ^ w);
  return x;
}
FL_INLINE vf max_lanes(vf x) {
#pragma GCC unroll 4
  for (int w = 1; w < VL; w *= 2) x = fast_max(x, __builtin_shuffle(x, iota() ^ w));
  return x;
}

// Two vectors as one of twice the length: its lanes in turn (a0 b0 a1 b1 ...), and back (even lanes, odd lanes).
#if FL_WIDTH == 16
#define FL_ZIP_LO 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define FL_ZIP_HI 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#define FL_EVEN 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define FL_ODD 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#elif FL_WIDTH == 8
#define FL_ZIP_LO 0, 8, 1, 9, 2, 10, 3, 11
#define FL_ZIP_HI 4, 12, 5, 13, 6, 14, 7, 15
#define FL_EVEN 0, 2, 4, 6, 8, 10, 12, 14
#define FL_ODD 1, 3, 5, 7, 9, 11, 13, 15
#else
#define FL_ZIP_LO 0, 4, 1, 5
#define FL_ZIP_HI 2, 6, 3, 7
#define FL_EVEN 0, 2, 4, 6
#define FL_ODD 1, 3, 5, 7
#endif
FL_INLINE vf zip_lo(vf a, vf b) { return __builtin_shufflevector(a, b, FL_ZIP_LO); }
FL_INLINE vf zip_hi(vf a, vf b) { return __builtin_shufflevector(a, b, FL_ZIP_HI); }
FL_INLINE vf evens(vf a, vf b) { return __builtin_shufflevector(a, b, FL_EVEN); }
FL_INLINE vf odds(vf a, vf b) { return __builtin_shufflevector(a, b, FL_ODD); }

// x[i][j] becomes x[j][i]: log2(VL) perfect shuffles.
FL_INLINE void transpose(vf* x) {
#pragma GCC unroll 4
  for (int w = 1; w < VL; w *= 2) {
    vf y[VL];
#pragma GCC unroll 16
    for (int i = 0; i < VL / 2; i++) y[2 * i] = zip_lo(x[i], x[i + VL / 2]), y[2 * i + 1] = zip_hi(x[i], x[i + VL / 2]);
#pragma GCC unroll 16
    for (int i = 0; i < VL; i++) x[i] = y[i];
  }
}

// A block of VL x VL floats, transposed on the way.
FL_OUTLINE void transpose_block(const float* from, int64_t from_row, float* to, int64_t to_row) {
  vf x[VL];
#pragma GCC unroll 16
  for (int i = 0; i < VL; i++) x[i] = loadu(from + i * from_row);
  transpose(x);
#pragma GCC unroll 16
  for (int i = 0; i < VL; i++) storeu(to + i * to_row, x[i]);
}

// The sums of VL vectors, in the lanes of one.
FL_INLINE vf sums(vf* x) {
#pragma GCC unroll 4
  for (int n = VL / 2; n; n /= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < n; i++) x[i] = zip_lo(x[i], x[i + n]) + zip_hi(x[i], x[i + n]);
  }
  return x[0];
}

// ---- narrow types to float32 (exact, including subnormals, infinities and NaN)

FL_INLINE vu widen_u16(vh x) {
#if defined(FL_AVX512) || defined(FL_AVX2)
  vu r;
  asm("vpmovzxwd %1, %0" : "=" FL_REG(r) : FL_REG(x));
  return r;
#else
  return __builtin_convertvector(x, vu);
#endif
}

FL_INLINE vf bf16_to_float(vh x) { return (vf)(widen_u16(x) << 16); }

#if defined(__aarch64__)
typedef __fp16 vp __attribute__((vector_size(VL * 2)));
#endif

FL_INLINE vf f16_to_float(vh x) {
#if defined(FL_AVX512) || defined(FL_AVX2)
  vf r;
  asm("vcvtph2ps %1, %0" : "=" FL_REG(r) : FL_REG(x));
  return r;
#elif defined(__aarch64__)
  return __builtin_convertvector((vp)x, vf);
#else
  vu u = widen_u16(x), e = u & 0x7c00;
  vf normal = (vf)(((u & 0x7fff) << 13) + (112u << 23));
  vf small = (normal - bc(0x1p-15f)) * 2.f;  // exponent field 0: 2^-15 (1 + m) was read, 2^-14 m is meant
  vf r = e == 0 ? small : normal;
  r = e == 0x7c00 ? (vf)((vu)normal | 0x7f800000u) : r;
  return (vf)((vu)r | (u & 0x8000) << 16);
#endif
}

FL_INLINE vu load_u8(const uint8_t* p) {
#if defined(FL_AVX512) || defined(FL_AVX2)
  struct bytes { uint8_t x[VL]; };
  vu r;
  asm("vpmovzxbd %1, %0" : "=" FL_REG(r) : "m"(*(const bytes*)p));
  return r;
#else
  return vu{p[0], p[1], p[2], p[3]};
#endif
}
FL_INLINE vi load_i8(const int8_t* p) {
#if defined(FL_AVX512) || defined(FL_AVX2)
  struct bytes { int8_t x[VL]; };
  vi r;
  asm("vpmovsxbd %1, %0" : "=" FL_REG(r) : "m"(*(const bytes*)p));
  return r;
#else
  return vi{p[0], p[1], p[2], p[3]};
#endif
}

// float8 e4m3 (fn: no infinity, 0x7f is NaN); multiplying a subnormal float would cost an assist, so it is subtracted out
FL_INLINE vf e4m3_to_float(vu u) {
  vu m = u & 0x7f;
  vf normal = (vf)((m << 20) + (120u << 23));
  vf small = (normal - bc(0x1p-7f)) * 2.f;
  vf r = m < 8 ? small : normal;
  r = m == 0x7f ? bc(__builtin_nanf("")) : r;
  return (vf)((vu)r | (u & 0x80) << 24);
}
FL_INLINE vf e5m2_to_float(vu u) {
  vu m = u & 0x7f;
  vf normal = (vf)((m << 21) + (112u << 23));
  vf small = (normal - bc(0x1p-15f)) * 2.f;
  vf r = m < 4 ? small : normal;
  r = m >= 0x7c ? (vf)((vu)normal | 0x7f800000u) : r;
  return (vf)((vu)r | (u & 0x80) << 24);
}

// ---- float32 to 16 bits, to nearest even

FL_INLINE vh float_to_bf16(vf x) {
#if defined(FL_AVX512) && defined(__AVX512BF16__)
  vh r;
  asm("vcvtneps2bf16 %1, %0" : "=v"(r) : "v"(x));
  return r;
#else
  vu u = (vu)x;
  u = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  u = x == x ? u : (vu)(bc(0x7fc0));
  return __builtin_convertvector(u, vh);
#endif
}

FL_INLINE uint16_t float_to_f16(float x) {
  union { float f; uint32_t u; } a = {x};
  uint32_t sign = a.u >> 16 & 0x8000, m = a.u & 0x7fffffff;
  if (m > 0x7f800000) return sign | 0x7e00;
  if (m >= 0x477ff000) return sign | 0x7c00;
  if (m < 0x38800000) {  // subnormal: adding 2^-1 leaves the rounded count of 2^-24 in the low bits
    a.u = m;
    a.f += 0.5f;
    return sign | (a.u - 0x3f000000);
  }
  m += 0xfff + (m >> 13 & 1);
  return sign | (m - (112u << 23)) >> 13;
}

FL_INLINE vh float_to_f16(vf x) {
#if defined(FL_AVX512) || defined(FL_AVX2)
  vh r;
  asm("vcvtps2ph $0, %1, %0" : "=" FL_REG(r) : FL_REG(x));
  return r;
#elif defined(__aarch64__)
  return (vh)__builtin_convertvector(x, vp);
#else
  vh r;
  for (int i = 0; i < VL; i++) r[i] = float_to_f16(x[i]);
  return r;
#endif
}

// ---- the softmax's exponential

// 2^x for x <= 0 (a little above is fine) to 1e-7 relative; below 2^-126, and for -inf, exactly 0; NaN stays NaN.
FL_INLINE vf fast_exp2(vf x) {
  vf t = x + 12582912.f, f = x - (t - 12582912.f);  // 1.5 * 2^23: t's low bits are round(x)
  vf p = bc(1.327647152e-03f);
  p = p * f + 9.675541331e-03f;
  p = p * f + 5.550713275e-02f;
  p = p * f + 2.402211972e-01f;
  p = p * f + 6.931469671e-01f;
  p = p * f + 1.f;
  vf r = (vf)((vi)p + ((vi)t << 23));
  return x < -126.f ? vf{} : r;
}

FL_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }  // to L2

template <class T> FL_INLINE constexpr T min_of(T a, T b) { return a < b ? a : b; }
template <class T> FL_INLINE constexpr T max_of(T a, T b) { return a > b ? a : b; }

}  // namespace flashloom
