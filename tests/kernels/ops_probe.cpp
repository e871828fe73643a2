// Every function of ops.h applied to arrays, for the tests to call through ctypes. n is a multiple of VL.
#include "ops.h"

using namespace flashloom;

static vi ints(const int32_t* p) { return *(const vi_u*)p; }
static void keep(float* p, vf x) { storeu(p, x); }
static void keep(int32_t* p, vi x) { *(vi_u*)p = x; }
static void keep(int32_t* p, vm x) { *(vi_u*)p = to_int32(x); }
static void keep(int64_t* p, vl x) { *(vq_u*)p = x.lo, *(vq_u*)(p + VL / 2) = x.hi; }
static void keep(double* p, vw x) { *(vd_u*)p = x.lo, *(vd_u*)(p + VL / 2) = x.hi; }
static vw doubles_at(const double* p) { return {*(const vd_u*)p, *(const vd_u*)(p + VL / 2)}; }
static vl longs(const int64_t* p) { return {*(const vq_u*)p, *(const vq_u*)(p + VL / 2)}; }

#define UNARY(name)                                                        \
  extern "C" void v_##name(const float* x, float* y, int n) {              \
    for (int i = 0; i < n; i += VL) storeu(y + i, name(loadu(x + i)));     \
  }                                                                        \
  extern "C" void s_##name(const float* x, float* y, int n) {              \
    for (int i = 0; i < n; i++) y[i] = name(x[i]);                         \
  }
UNARY(exp) UNARY(exp2) UNARY(log) UNARY(log2) UNARY(tanh) UNARY(sigmoid) UNARY(sqrt) UNARY(rsqrt) UNARY(erf)
UNARY(sin) UNARY(cos) UNARY(floor) UNARY(abs_) UNARY(neg)
#define WIDE(name)                                                             \
  extern "C" void vd_##name(const double* x, double* y, int n) {               \
    for (int i = 0; i < n; i += VL) keep(y + i, name(doubles_at(x + i)));      \
  }                                                                            \
  extern "C" void sd_##name(const double* x, double* y, int n) {               \
    for (int i = 0; i < n; i++) y[i] = name(x[i]);                             \
  }
WIDE(exp) WIDE(exp2) WIDE(log) WIDE(log2) WIDE(tanh) WIDE(sigmoid) WIDE(sqrt) WIDE(rsqrt) WIDE(floor) WIDE(abs_) WIDE(neg)
extern "C" void v_fast_exp2(const float* x, float* y, int n) {
  for (int i = 0; i < n; i += VL) storeu(y + i, fast_exp2(loadu(x + i)));
}

#define BINARY(kind, T, R, get, name)                                                   \
  extern "C" void vv_##kind##_##name(const T* a, const T* b, R* y, int n) {             \
    for (int i = 0; i < n; i += VL) keep(y + i, name(get(a + i), get(b + i)));          \
  }                                                                                     \
  extern "C" void vs_##kind##_##name(const T* a, const T* b, R* y, int n) {             \
    for (int i = 0; i < n; i += VL) keep(y + i, name(get(a + i), b[0]));                \
  }                                                                                     \
  extern "C" void sv_##kind##_##name(const T* a, const T* b, R* y, int n) {             \
    for (int i = 0; i < n; i += VL) keep(y + i, name(a[0], get(b + i)));                \
  }                                                                                     \
  extern "C" void ss_##kind##_##name(const T* a, const T* b, R* y, int n) {             \
    for (int i = 0; i < n; i++) y[i] = name(a[i], b[i]);                                \
  }
#define COMPARE(kind, T, get)                                                                        \
  BINARY(kind, T, int32_t, get, lt) BINARY(kind, T, int32_t, get, le) BINARY(kind, T, int32_t, get, gt) \
  BINARY(kind, T, int32_t, get, ge) BINARY(kind, T, int32_t, get, eq) BINARY(kind, T, int32_t, get, ne)
#define COMMON(kind, T, get)                                                                   \
  BINARY(kind, T, T, get, add) BINARY(kind, T, T, get, sub) BINARY(kind, T, T, get, mul)       \
  BINARY(kind, T, T, get, min_) BINARY(kind, T, T, get, max_) BINARY(kind, T, T, get, floordiv) \
  BINARY(kind, T, T, get, mod) COMPARE(kind, T, get)
#define BITS(kind, T, get)                                                                           \
  BINARY(kind, T, T, get, bitand_) BINARY(kind, T, T, get, bitor_) BINARY(kind, T, T, get, bitxor_)  \
  BINARY(kind, T, T, get, shl_) BINARY(kind, T, T, get, shr_)
COMMON(f, float, loadu) BINARY(f, float, float, loadu, div)
COMMON(d, double, doubles_at) BINARY(d, double, double, doubles_at, div)
COMMON(i, int32_t, ints) BITS(i, int32_t, ints)
COMMON(l, int64_t, longs) BITS(l, int64_t, longs)

extern "C" void constant_division(const int32_t* a, int32_t* q, int32_t* r, int n) {
  for (int i = 0; i < n; i += VL) keep(q + i, floordiv(ints(a + i), 16)), keep(r + i, mod(ints(a + i), 16));
}

// where, logic and conversions over masks made by comparisons
extern "C" void logic(const float* a, const float* b, int32_t* y, int n) {
  for (int i = 0; i < n; i += VL) {
    vm p = lt(loadu(a + i), loadu(b + i)), q = gt(loadu(a + i), 0.f);
    keep(y + i, where(xor_(and_(p, q), not_(or_(p, false))), to_int32(q), add(to_int32(p), 2)));
  }
}
extern "C" void conversions(const float* a, float* f, int32_t* i32, int64_t* i64, int n) {
  for (int i = 0; i < n; i += VL) {
    vf x = loadu(a + i);
    keep(i32 + i, to_int32(x)), keep(i64 + i, to_int64(x));
    keep(f + i, add(to_float(to_int64(x)), add(to_float(to_int32(to_int64(x))), to_float(to_bool(to_int64(x))))));
  }
}

extern "C" void wide_conversions(const double* a, float* f, int32_t* i32, int64_t* i64, int32_t* b, double* d, int n) {
  for (int i = 0; i < n; i += VL) {
    vw x = doubles_at(a + i);
    keep(f + i, to_float(x)), keep(i32 + i, to_int32(x)), keep(i64 + i, to_int64(x));
    keep(b + i, add(to_int32(to_bool(x)), to_int32(isnan_(x))));
    keep(d + i, add(add(to_double(to_float(x)), to_double(to_int32(x))), add(to_double(to_int64(x)), to_double(to_bool(x)))));
  }
}

#define LOAD(tag, T, put)                                                                        \
  extern "C" void load_##tag(const void* base, const int32_t* index, T* y, int n, int wide) {    \
    for (int i = 0; i < n; i += VL) {                                                            \
      vi at = ints(index + i);                                                                   \
      if (wide) keep(y + i, put(load<tag>(base, to_int64(at))));                                 \
      else keep(y + i, put(load<tag>(base, at)));                                                \
    }                                                                                            \
  }                                                                                              \
  extern "C" void one_##tag(const void* base, const int32_t* index, T* y, int n) {               \
    for (int i = 0; i < n; i++) y[i] = load<tag>(base, index[i]);                                \
  }                                                                                              \
  extern "C" T low_##tag(const void* base, const int64_t* b) {                                   \
    return block_min<tag>(base, b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]);                 \
  }                                                                                              \
  extern "C" T high_##tag(const void* base, const int64_t* b) {                                  \
    return block_max<tag>(base, b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]);                 \
  }
LOAD(f32, float, ) LOAD(f16, float, ) LOAD(bf16, float, ) LOAD(f64, double, )
LOAD(i64, int64_t, ) LOAD(i32, int32_t, ) LOAD(i16, int32_t, ) LOAD(i8, int32_t, ) LOAD(u8, int32_t, )
LOAD(b8, int32_t, to_int32)
extern "C" void load_bits(const void* base, const int32_t* index, int32_t* y, int n) {
  for (int i = 0; i < n; i += VL) keep(y + i, load_bit(base, ints(index + i)));
}
extern "C" int bound_bit(const void* base, int64_t lo, int64_t hi, int64_t size, int max) {
  return max ? block_max_bit(base, lo, hi, size) : block_min_bit(base, lo, hi, size);
}
extern "C" void clamps(const int32_t* index, int32_t* y, int64_t* z, int64_t size, int n) {
  for (int i = 0; i < n; i += VL) {
    keep(y + i, clamp_index(ints(index + i), size)), keep(z + i, clamp_index(to_int64(ints(index + i)), size));
  }
}
extern "C" void wraps(const int32_t* index, int32_t* y, int64_t* z, int64_t* one, int64_t size, int n) {
  for (int i = 0; i < n; i += VL) {
    keep(y + i, wrap_index(ints(index + i), size)), keep(z + i, wrap_index(to_int64(ints(index + i)), size));
  }
  for (int i = 0; i < n; i++) one[i] = wrap_index(index[i], size) + (wrap_index((int64_t)index[i], size) << 32);
}

extern "C" void fp8_to_float(const uint8_t* x, float* y, int e5m2) {
  for (int i = 0; i < 256; i += VL) storeu(y + i, e5m2 ? e5m2_to_float(load_u8(x + i)) : e4m3_to_float(load_u8(x + i)));
}
extern "C" void to_16_bits(const float* x, uint16_t* y, int n, int bfloat) {
  for (int i = 0; i < n; i += VL) *(vh_u*)(y + i) = bfloat ? float_to_bf16(loadu(x + i)) : float_to_f16(loadu(x + i));
}
extern "C" int lanes() { return VL; }
