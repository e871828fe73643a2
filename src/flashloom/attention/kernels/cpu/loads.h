// Loads from a variant's parameter tensors: single elements, vectors of elements, and bounds over an index box.
#pragma once
#include "ops.h"

namespace flashloom {

// Storage tags. `one` and `block` (VL consecutive elements) answer the compute type.
struct f32 {
  typedef float raw; typedef float scalar; typedef vf vector;
  static FL_INLINE float one(const void* p, int64_t i) { return ((const float*)p)[i]; }
  static FL_INLINE vf block(const void* p, int64_t i) { return loadu((const float*)p + i); }
};
struct f16 {
  typedef uint16_t raw; typedef float scalar; typedef vf vector;
  static FL_INLINE vf block(const void* p, int64_t i) { return f16_to_float(*(const vh_u*)((const uint16_t*)p + i)); }
  static FL_INLINE float one(const void* p, int64_t i) {
    vh x = {};
    x[0] = ((const uint16_t*)p)[i];
    return f16_to_float(x)[0];
  }
};
struct bf16 {
  typedef uint16_t raw; typedef float scalar; typedef vf vector;
  static FL_INLINE vf block(const void* p, int64_t i) { return bf16_to_float(*(const vh_u*)((const uint16_t*)p + i)); }
  static FL_INLINE float one(const void* p, int64_t i) {
    union { uint32_t u; float f; } x = {(uint32_t)((const uint16_t*)p)[i] << 16};
    return x.f;
  }
};
struct f64 {
  typedef double raw; typedef double scalar; typedef vw vector;
  static FL_INLINE double one(const void* p, int64_t i) { return ((const double*)p)[i]; }
  static FL_INLINE vw block(const void* p, int64_t i) {
    const double* x = (const double*)p + i;
    return {*(const vd_u*)x, *(const vd_u*)(x + VL / 2)};
  }
};
struct i64 {
  typedef int64_t raw; typedef int64_t scalar; typedef vl vector;
  static FL_INLINE int64_t one(const void* p, int64_t i) { return ((const int64_t*)p)[i]; }
  static FL_INLINE vl block(const void* p, int64_t i) {
    const int64_t* x = (const int64_t*)p + i;
    return {*(const vq_u*)x, *(const vq_u*)(x + VL / 2)};
  }
};
struct i32 {
  typedef int32_t raw; typedef int32_t scalar; typedef vi vector;
  static FL_INLINE int32_t one(const void* p, int64_t i) { return ((const int32_t*)p)[i]; }
  static FL_INLINE vi block(const void* p, int64_t i) { return *(const vi_u*)((const int32_t*)p + i); }
};
struct i16 {
  typedef int16_t raw; typedef int32_t scalar; typedef vi vector;
  static FL_INLINE int32_t one(const void* p, int64_t i) { return ((const int16_t*)p)[i]; }
  static FL_INLINE vi block(const void* p, int64_t i) {
    return (vi)(widen_u16(*(const vh_u*)((const int16_t*)p + i)) << 16) >> 16;
  }
};
struct i8 {
  typedef int8_t raw; typedef int32_t scalar; typedef vi vector;
  static FL_INLINE int32_t one(const void* p, int64_t i) { return ((const int8_t*)p)[i]; }
  static FL_INLINE vi block(const void* p, int64_t i) { return load_i8((const int8_t*)p + i); }
};
struct u8 {
  typedef uint8_t raw; typedef int32_t scalar; typedef vi vector;
  static FL_INLINE int32_t one(const void* p, int64_t i) { return ((const uint8_t*)p)[i]; }
  static FL_INLINE vi block(const void* p, int64_t i) { return (vi)load_u8((const uint8_t*)p + i); }
};
struct b8 {
  typedef uint8_t raw; typedef bool scalar; typedef vm vector;
  static FL_INLINE bool one(const void* p, int64_t i) { return ((const uint8_t*)p)[i] != 0; }
  static FL_INLINE vm block(const void* p, int64_t i) { return vm(load_u8((const uint8_t*)p + i) != 0); }
};

FL_INLINE vf pack_lanes(const float* x) { return loadu(x); }
FL_INLINE vi pack_lanes(const int32_t* x) { return *(const vi_u*)x; }
FL_INLINE vl pack_lanes(const int64_t* x) { return {*(const vq_u*)x, *(const vq_u*)(x + VL / 2)}; }
FL_INLINE vw pack_lanes(const double* x) { return {*(const vd_u*)x, *(const vd_u*)(x + VL / 2)}; }
FL_INLINE vm pack_lanes(const bool* x) {
  vi r{};
  for (int i = 0; i < VL; i++) r[i] = -(int32_t)x[i];
  return vm(r);
}
template <class T, class I> FL_INLINE typename T::vector load_each(const void* base, const I* index) {
  typename T::scalar x[VL];
  for (int k = 0; k < VL; k++) x[k] = T::one(base, index[k]);
  return pack_lanes(x);
}

FL_INLINE bool consecutive(vi i) { return !any((i - i[0]) ^ iota()); }
FL_INLINE bool consecutive(const vl& i) {
  vl step = {widen_lo(iota()), widen_hi(iota())};
  return !any((i != lift<vl>(i.lo[0]) + step).m);
}

template <class T> FL_INLINE typename T::scalar load(const void* base, int64_t i) { return T::one(base, i); }
template <class T> FL_INLINE typename T::scalar load(const void* base, int32_t i) { return T::one(base, i); }
template <class T> FL_INLINE typename T::vector load(const void* base, vi i) {
  if (consecutive(i)) return T::block(base, i[0]);
#if defined(FL_AVX512)
  if (same<T, f32>::value || same<T, i32>::value) {
    union { vi i; typename T::vector v; } r;
    asm("kxnorw %%k1, %%k1, %%k1\n\tvpgatherdd (%1,%2,4), %0%{%%k1%}"
        : "=&v"(r.i) : "r"(base), "v"(i), "m"(*(const int32_t(*)[])base) : "k1");
    return r.v;
  }
#elif defined(FL_AVX2)
  if (same<T, f32>::value || same<T, i32>::value) {
    union { vi i; typename T::vector v; } r;
    vi all = bc(-1);
    asm("vpgatherdd %1, (%2,%3,4), %0" : "=&x"(r.i), "+&x"(all) : "r"(base), "x"(i), "m"(*(const int32_t(*)[])base));
    return r.v;
  }
#endif
  int32_t index[VL];
  *(vi_u*)index = i;
  return load_each<T>(base, index);
}
template <class T> FL_INLINE typename T::vector load(const void* base, const vl& i) {
  if (consecutive(i)) return T::block(base, i.lo[0]);
  return load_each<T>(base, unpack(i).x);
}
FL_INLINE vf gather(const float* x, vi i) { return load<f32>(x, i); }
FL_INLINE float gather(const float* x, int32_t i) { return x[i]; }

FL_INLINE bool load_bit(const void* base, int64_t i) { return ((const uint8_t*)base)[i >> 3] >> (i & 7) & 1; }
FL_INLINE bool load_bit(const void* base, int32_t i) { return load_bit(base, (int64_t)i); }
FL_INLINE vm load_bit(const void* base, const vl& i) {
  if (consecutive(i)) {  // VL + 7 bits span at most VL / 8 + 1 bytes
    int64_t first = i.lo[0], byte = first >> 3, last = (first + VL - 1) >> 3;
    uint32_t bits = 0;
    for (int k = 0; k <= last - byte; k++) bits |= (uint32_t)((const uint8_t*)base)[byte + k] << 8 * k;
    return vm((bc((int32_t)(bits >> (first & 7))) & (1 << iota())) != 0);
  }
  lanes64 index = unpack(i);
  bool r[VL];
  for (int k = 0; k < VL; k++) r[k] = load_bit(base, index.x[k]);
  return pack_lanes(r);
}
FL_INLINE vm load_bit(const void* base, vi i) { return load_bit(base, to_int64(i)); }

FL_INLINE int64_t clamp_index(int64_t i, int64_t size) { return i < 0 || size < 1 ? 0 : i >= size ? size - 1 : i; }
FL_INLINE int32_t top_index(int64_t size) { return size < 1 ? 0 : size > INT32_MAX ? INT32_MAX : (int32_t)(size - 1); }
FL_INLINE int32_t clamp_index(int32_t i, int64_t size) { return lesser(greater(i, 0), top_index(size)); }
FL_INLINE vi clamp_index(vi i, int64_t size) { return lesser(greater(i, vi{}), bc(top_index(size))); }
FL_INLINE vl clamp_index(vl i, int64_t size) {
  return lesser(greater(i, vl{}), lift<vl>(size < 1 ? (int64_t)0 : size - 1));
}

// A negative index counts from the end.
FL_INLINE int64_t wrap_index(int64_t i, int64_t size) { return clamp_index(i < 0 ? i + size : i, size); }
FL_INLINE int32_t wrap_index(int32_t i, int64_t size) { return clamp_index(i < 0 ? i + (top_index(size) + 1) : i, size); }
FL_INLINE vi wrap_index(vi i, int64_t size) { return clamp_index(i + (bc(top_index(size) + 1) & (i < 0)), size); }
FL_INLINE vl wrap_index(vl i, int64_t size) { return clamp_index(select(i < vl{}, i + lift<vl>(size), i), size); }

// Entry i of a tensor [size], with offsets of 32 bits wherever they do.
template <class T, class I> FL_INLINE auto load_entry(const void* base, I i, int64_t size, int64_t stride) {
  auto at = clamp_index(i, size);
  const int64_t reach = (size - 1) * stride;
  if (__builtin_expect(reach >= -INT32_MAX && reach <= INT32_MAX, 1)) return load<T>(base, mul(to_int32(at), (int32_t)stride));
  return load<T>(base, mul(to_int64(at), stride));
}

// ---- bounds over an inclusive index box, for tile verdicts

constexpr int64_t BOX_LIMIT = 65536;  // a larger box is not read: its bounds are the type's

FL_INLINE float lowest(float) { return -__builtin_inff(); }
FL_INLINE float highest(float) { return __builtin_inff(); }
FL_INLINE double lowest(double) { return -__builtin_inf(); }
FL_INLINE double highest(double) { return __builtin_inf(); }
FL_INLINE int32_t lowest(int32_t) { return INT32_MIN; }
FL_INLINE int32_t highest(int32_t) { return INT32_MAX; }
FL_INLINE int64_t lowest(int64_t) { return INT64_MIN; }
FL_INLINE int64_t highest(int64_t) { return INT64_MAX; }
FL_INLINE bool lowest(bool) { return false; }
FL_INLINE bool highest(bool) { return true; }
FL_INLINE bool plain(bool x) { return x; }
FL_INLINE float plain(float x) { return x; }
FL_INLINE double plain(double x) { return x; }
FL_INLINE int32_t plain(int32_t x) { return x; }
FL_INLINE int64_t plain(int64_t x) { return x; }
template <class T> struct bound_of { typedef typename T::scalar type; };
template <> struct bound_of<b8> { typedef bool type; };

template <class T, bool MAX> typename bound_of<T>::type block_bound(const void* base, const int64_t* box, int rank) {
  typedef typename bound_of<T>::type S;
  int64_t lo[8], hi[8], stride[8], count = 1;
  S unknown = MAX ? highest(S()) : lowest(S());
  for (int r = 0; r < rank; r++) {
    int64_t size = box[4 * r + 2];
    if (size < 1) return unknown;
    lo[r] = clamp_index(box[4 * r], size), hi[r] = clamp_index(box[4 * r + 1], size), stride[r] = box[4 * r + 3];
    if (hi[r] < lo[r]) return unknown;
    count *= hi[r] - lo[r] + 1;
    if (count > BOX_LIMIT) return unknown;
  }
  S best = MAX ? lowest(S()) : highest(S());
  int64_t at[8];
  for (int r = 0; r < rank; r++) at[r] = lo[r];
  for (;;) {
    int64_t offset = 0;
    for (int r = 0; r < rank; r++) offset += at[r] * stride[r];
    int64_t inner = rank ? hi[rank - 1] - lo[rank - 1] + 1 : 1, step = rank ? stride[rank - 1] : 0;
    for (int64_t k = 0; k < inner; k++) {
      S x = plain(T::one(base, offset + k * step));
      best = MAX ? greater(best, x) : lesser(best, x);
    }
    int r = rank - 2;
    while (r >= 0 && ++at[r] > hi[r]) at[r] = lo[r], r--;
    if (r < 0) return best;
  }
}
template <class T, class... I> FL_INLINE typename bound_of<T>::type block_min(const void* base, I... index) {
  const int64_t box[] = {(int64_t)index..., 0};
  return block_bound<T, false>(base, box, sizeof...(I) / 4);
}
template <class T, class... I> FL_INLINE typename bound_of<T>::type block_max(const void* base, I... index) {
  const int64_t box[] = {(int64_t)index..., 0};
  return block_bound<T, true>(base, box, sizeof...(I) / 4);
}

// Bits lo..hi of a bit array of `size` bits: all ones? any one?
inline int32_t block_bits(const void* base, int64_t lo, int64_t hi, int64_t size, bool find) {
  lo = clamp_index(lo, size), hi = clamp_index(hi, size);
  if (size < 1 || hi < lo || hi - lo >= BOX_LIMIT * 8) return find;
  for (int64_t i = lo; i <= hi;) {
    uint8_t byte = ((const uint8_t*)base)[i >> 3];
    if ((i & 7) == 0 && i + 7 <= hi) {
      if (byte != (find ? 0 : 255)) return find;
      i += 8;
    } else {
      if ((byte >> (i & 7) & 1) == (int)find) return find;
      i++;
    }
  }
  return !find;
}
FL_INLINE bool block_min_bit(const void* base, int64_t lo, int64_t hi, int64_t size) {
  return block_bits(base, lo, hi, size, false);
}
FL_INLINE bool block_max_bit(const void* base, int64_t lo, int64_t hi, int64_t size) {
  return block_bits(base, lo, hi, size, true);
}

}  // namespace flashloom
