// What the generated text of a variant may call: plain functions, overloaded on scalars and vectors.
//
// Each binary operation takes any mix of a scalar and a vector of one kind (float | vf, double | vw, int32_t | vi,
// int64_t | vl, bool | vm) and answers a vector as soon as one operand is one. A raw vi (0 / -1) is taken as a mask where a mask is asked.
#pragma once
#include "vmath.h"

namespace flashloom {

// ---- kinds

template <class T> struct lane;
template <> struct lane<float> { typedef float scalar; typedef vf vector; static constexpr bool wide = false; };
template <> struct lane<vf> { typedef float scalar; typedef vf vector; static constexpr bool wide = true; };
template <> struct lane<int32_t> { typedef int32_t scalar; typedef vi vector; static constexpr bool wide = false; };
template <> struct lane<vi> { typedef int32_t scalar; typedef vi vector; static constexpr bool wide = true; };
template <> struct lane<long> { typedef int64_t scalar; typedef vl vector; static constexpr bool wide = false; };
template <> struct lane<long long> { typedef int64_t scalar; typedef vl vector; static constexpr bool wide = false; };
template <> struct lane<vl> { typedef int64_t scalar; typedef vl vector; static constexpr bool wide = true; };
template <> struct lane<double> { typedef double scalar; typedef vw vector; static constexpr bool wide = false; };
template <> struct lane<vw> { typedef double scalar; typedef vw vector; static constexpr bool wide = true; };
template <> struct lane<bool> { typedef bool scalar; typedef vm vector; static constexpr bool wide = false; };
template <> struct lane<vm> { typedef bool scalar; typedef vm vector; static constexpr bool wide = true; };

template <bool C, class A, class B> struct choose { typedef A type; };
template <class A, class B> struct choose<false, A, B> { typedef B type; };
template <class A, class B> struct same { static constexpr bool value = false; };
template <class A> struct same<A, A> { static constexpr bool value = true; };

// The type of an operation on A and B.
template <class A, class B> struct common_of {
  static_assert(same<typename lane<A>::vector, typename lane<B>::vector>::value, "operands of one kind");
  static constexpr bool wide = lane<A>::wide || lane<B>::wide;
  typedef typename choose<wide, typename lane<A>::vector, typename lane<A>::scalar>::type type;
};
template <class A, class B> using common = typename common_of<A, B>::type;

template <class T> struct lift_to {
  static FL_INLINE T of(T x) { return x; }
};
template <> struct lift_to<vf> {
  static FL_INLINE vf of(vf x) { return x; }
  static FL_INLINE vf of(float x) { return bc(x); }
};
template <> struct lift_to<vi> {
  static FL_INLINE vi of(vi x) { return x; }
  static FL_INLINE vi of(int32_t x) { return bc(x); }
};
template <> struct lift_to<vl> {
  static FL_INLINE vl of(vl x) { return x; }
  static FL_INLINE vl of(int64_t x) { return {bcq(x), bcq(x)}; }
};
template <> struct lift_to<vw> {
  static FL_INLINE vw of(vw x) { return x; }
  static FL_INLINE vw of(double x) { return {bcd(x), bcd(x)}; }
};
template <> struct lift_to<vm> {
  static FL_INLINE vm of(vm x) { return x; }
  static FL_INLINE vm of(vi x) { return vm(x); }
  static FL_INLINE vm of(bool x) { return vm(bc(-(int32_t)x)); }
};
template <class T, class A> FL_INLINE T lift(A x) { return lift_to<T>::of(x); }

FL_INLINE bool as_mask(bool x) { return x; }
FL_INLINE vm as_mask(vi x) { return vm(x); }
FL_INLINE vm as_mask(vm x) { return x; }

FL_INLINE vf splat(vf x) { return x; }
FL_INLINE vf splat(float x) { return bc(x); }
FL_INLINE double word_as_double(int64_t word) {
  double x;
  __builtin_memcpy(&x, &word, 8);
  return x;
}

// What a verdict is asked of: inclusive bounds.
struct Tile {
  int32_t batch, kv_head, q_head_lo, q_head_hi, q_pos_lo, q_pos_hi, kv_pos_lo, kv_pos_hi, q_len, kv_len, q_start, kv_start;
};

// ---- 64-bit lanes

FL_INLINE vm narrow_mask(vq lo, vq hi) { return vm(join(__builtin_convertvector(lo, vih), __builtin_convertvector(hi, vih))); }
FL_INLINE vq widen_lo(vi x) { return __builtin_convertvector(lo_half(x), vq); }
FL_INLINE vq widen_hi(vi x) { return __builtin_convertvector(hi_half(x), vq); }
#define FL_WIDE(op) \
  FL_INLINE vl operator op(vl a, vl b) { return {a.lo op b.lo, a.hi op b.hi}; }
FL_WIDE(+) FL_WIDE(-) FL_WIDE(*) FL_WIDE(&) FL_WIDE(|) FL_WIDE(^)
#undef FL_WIDE
#define FL_WIDE(op) \
  FL_INLINE vm operator op(vl a, vl b) { return narrow_mask(a.lo op b.lo, a.hi op b.hi); }
FL_WIDE(<) FL_WIDE(<=) FL_WIDE(>) FL_WIDE(>=) FL_WIDE(==) FL_WIDE(!=)
#undef FL_WIDE
FL_INLINE vl operator-(vl a) { return {-a.lo, -a.hi}; }
FL_INLINE vl operator~(vl a) { return {~a.lo, ~a.hi}; }
struct lanes64 { int64_t x[VL]; };
FL_INLINE lanes64 unpack(const vl& v) {
  lanes64 a;
  *(vq_u*)a.x = v.lo, *(vq_u*)(a.x + VL / 2) = v.hi;
  return a;
}
FL_INLINE vl repack(const lanes64& a) { return {*(const vq_u*)a.x, *(const vq_u*)(a.x + VL / 2)}; }

// ---- double lanes

FL_INLINE vw operator+(vw a, vw b) { return {a.lo + b.lo, a.hi + b.hi}; }
FL_INLINE vw operator-(vw a, vw b) { return {a.lo - b.lo, a.hi - b.hi}; }
FL_INLINE vw operator*(vw a, vw b) { return {a.lo * b.lo, a.hi * b.hi}; }
FL_INLINE vw operator/(vw a, vw b) { return {a.lo / b.lo, a.hi / b.hi}; }
FL_INLINE vw operator-(vw a) { return {-a.lo, -a.hi}; }
#define FL_WIDE(op) \
  FL_INLINE vm operator op(vw a, vw b) { return narrow_mask((vq)(a.lo op b.lo), (vq)(a.hi op b.hi)); }
FL_WIDE(<) FL_WIDE(<=) FL_WIDE(>) FL_WIDE(>=) FL_WIDE(==) FL_WIDE(!=)
#undef FL_WIDE
struct doubles { double x[VL]; };
FL_INLINE doubles unpack(const vw& v) {
  doubles a;
  *(vd_u*)a.x = v.lo, *(vd_u*)(a.x + VL / 2) = v.hi;
  return a;
}
FL_INLINE vw repack(const doubles& a) { return {*(const vd_u*)a.x, *(const vd_u*)(a.x + VL / 2)}; }

// ---- selection

FL_INLINE vf select(vm m, vf a, vf b) { return m.m ? a : b; }
FL_INLINE vi select(vm m, vi a, vi b) { return m.m ? a : b; }
FL_INLINE vm select(vm m, vm a, vm b) { return vm((m.m & a.m) | (~m.m & b.m)); }
FL_INLINE vl select(vm m, vl a, vl b) {
  vq lo = widen_lo(m.m), hi = widen_hi(m.m);
  return {(a.lo & lo) | (b.lo & ~lo), (a.hi & hi) | (b.hi & ~hi)};
}
FL_INLINE vw select(vm m, vw a, vw b) {
  vq lo = widen_lo(m.m), hi = widen_hi(m.m);
  return {lo ? a.lo : b.lo, hi ? a.hi : b.hi};
}
template <class A, class B> FL_INLINE common<A, B> where(bool m, A a, B b) {
  typedef common<A, B> T;
  return m ? lift<T>(a) : lift<T>(b);
}
template <class M, class A, class B> FL_INLINE typename lane<common<A, B>>::vector where_lanes(M m, A a, B b) {
  typedef typename lane<common<A, B>>::vector T;
  return select(as_mask(m), lift<T>(a), lift<T>(b));
}
template <class A, class B> FL_INLINE auto where(vm m, A a, B b) { return where_lanes(m, a, b); }
template <class A, class B> FL_INLINE auto where(vi m, A a, B b) { return where_lanes(m, a, b); }

// ---- arithmetic, comparison, logic

#define FL_BINARY(name, ...)                               \
  template <class A, class B> FL_INLINE auto name(A a_, B b_) { \
    typedef common<A, B> T;                                \
    T a = lift<T>(a_), b = lift<T>(b_);                    \
    return __VA_ARGS__;                                    \
  }
FL_BINARY(add, T(a + b))
FL_BINARY(sub, T(a - b))
FL_BINARY(mul, T(a * b))
FL_BINARY(div, T(a / b))
FL_BINARY(bitand_, T(a & b))
FL_BINARY(bitor_, T(a | b))
FL_BINARY(bitxor_, T(a ^ b))
FL_BINARY(lt, as_mask(a < b))
FL_BINARY(le, as_mask(a <= b))
FL_BINARY(gt, as_mask(a > b))
FL_BINARY(ge, as_mask(a >= b))
FL_BINARY(eq, as_mask(a == b))
FL_BINARY(ne, as_mask(a != b))
#undef FL_BINARY

template <class A> FL_INLINE A neg(A a) { return -a; }
template <class A> FL_INLINE A bitnot_(A a) { return ~a; }

FL_INLINE bool and_(bool a, bool b) { return a && b; }
FL_INLINE bool or_(bool a, bool b) { return a || b; }
FL_INLINE bool xor_(bool a, bool b) { return a != b; }
FL_INLINE bool not_(bool a) { return !a; }
FL_INLINE vm not_(vm a) { return vm(~a.m); }
FL_INLINE vm not_(vi a) { return vm(~a); }
#define FL_LOGIC(name, op)                                                                           \
  template <class A, class B> FL_INLINE typename choose<lane<A>::wide || lane<B>::wide, vm, bool>::type name(A a, B b) { \
    return vm(lift<vm>(a).m op lift<vm>(b).m);                                                       \
  }
FL_LOGIC(and_, &) FL_LOGIC(or_, |) FL_LOGIC(xor_, ^)
#undef FL_LOGIC

// NaN in either operand gives NaN, as torch.minimum and torch.maximum
FL_INLINE float lesser(float a, float b) { return a != a || a < b ? a : b; }
FL_INLINE float greater(float a, float b) { return a != a || a > b ? a : b; }
FL_INLINE vf lesser(vf a, vf b) { return a != a ? a : fast_min(a, b); }
FL_INLINE vf greater(vf a, vf b) { return a != a ? a : fast_max(a, b); }
FL_INLINE double lesser(double a, double b) { return a != a || a < b ? a : b; }
FL_INLINE double greater(double a, double b) { return a != a || a > b ? a : b; }
FL_INLINE vw lesser(vw a, vw b) { return select(or_(a != a, a < b), a, b); }
FL_INLINE vw greater(vw a, vw b) { return select(or_(a != a, a > b), a, b); }
FL_INLINE int32_t lesser(int32_t a, int32_t b) { return a < b ? a : b; }
FL_INLINE int32_t greater(int32_t a, int32_t b) { return a > b ? a : b; }
FL_INLINE vi lesser(vi a, vi b) { return a < b ? a : b; }
FL_INLINE vi greater(vi a, vi b) { return a > b ? a : b; }
FL_INLINE int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }
FL_INLINE int64_t greater(int64_t a, int64_t b) { return a > b ? a : b; }
FL_INLINE vl lesser(vl a, vl b) { return select(a < b, a, b); }
FL_INLINE vl greater(vl a, vl b) { return select(a > b, a, b); }
template <class A, class B> FL_INLINE common<A, B> min_(A a, B b) {
  return lesser(lift<common<A, B>>(a), lift<common<A, B>>(b));
}
template <class A, class B> FL_INLINE common<A, B> max_(A a, B b) {
  return greater(lift<common<A, B>>(a), lift<common<A, B>>(b));
}

FL_INLINE float abs_(float x) { return __builtin_fabsf(x); }
FL_INLINE vf abs_(vf x) { return vabs(x); }
FL_INLINE double abs_(double x) { return __builtin_fabs(x); }
FL_INLINE vw abs_(vw x) { return {(vd)((vq)x.lo & INT64_MAX), (vd)((vq)x.hi & INT64_MAX)}; }
FL_INLINE int32_t abs_(int32_t x) { return x < 0 ? -x : x; }
FL_INLINE int64_t abs_(int64_t x) { return x < 0 ? -x : x; }
FL_INLINE vi abs_(vi x) { return x < 0 ? -x : x; }
FL_INLINE vl abs_(vl x) { return select(x < vl{}, -x, x); }

// ---- shifts: a count of the width or more shifts everything out (a right shift keeps the sign)

FL_INLINE int32_t shl_one(int32_t a, int32_t b) { return (uint32_t)b > 31 ? 0 : (int32_t)((uint32_t)a << b); }
FL_INLINE int32_t shr_one(int32_t a, int32_t b) { return a >> ((uint32_t)b > 31 ? 31 : b); }
FL_INLINE int64_t shl_one(int64_t a, int64_t b) { return (uint64_t)b > 63 ? 0 : (int64_t)((uint64_t)a << b); }
FL_INLINE int64_t shr_one(int64_t a, int64_t b) { return a >> ((uint64_t)b > 63 ? 63 : b); }
FL_INLINE vi shl_one(vi a, vi b) { return (vu)b > 31 ? vi{} : (vi)((vu)a << ((vu)b & 31)); }
FL_INLINE vi shr_one(vi a, vi b) { return a >> ((vu)b > 31 ? bc(31) : b); }
template <class F> FL_INLINE vl each(vl a, vl b, F f) {
  lanes64 x = unpack(a), y = unpack(b);
  for (int i = 0; i < VL; i++) x.x[i] = f(x.x[i], y.x[i]);
  return repack(x);
}
FL_INLINE vl shl_one(vl a, vl b) {
  return each(a, b, [](int64_t x, int64_t y) { return shl_one(x, y); });
}
FL_INLINE vl shr_one(vl a, vl b) {
  return each(a, b, [](int64_t x, int64_t y) { return shr_one(x, y); });
}
template <class A, class B> FL_INLINE common<A, B> shl_(A a, B b) {
  return shl_one(lift<common<A, B>>(a), lift<common<A, B>>(b));
}
template <class A, class B> FL_INLINE common<A, B> shr_(A a, B b) {
  return shr_one(lift<common<A, B>>(a), lift<common<A, B>>(b));
}

// ---- conversions

FL_INLINE float to_float(float x) { return x; }
FL_INLINE float to_float(int32_t x) { return (float)x; }
FL_INLINE float to_float(int64_t x) { return (float)x; }
FL_INLINE float to_float(bool x) { return x ? 1.f : 0.f; }
FL_INLINE float to_float(double x) { return (float)x; }
FL_INLINE vf to_float(vw x) { return join(__builtin_convertvector(x.lo, vfh), __builtin_convertvector(x.hi, vfh)); }
FL_INLINE double to_double(float x) { return x; }
FL_INLINE double to_double(double x) { return x; }
FL_INLINE double to_double(int32_t x) { return x; }
FL_INLINE double to_double(int64_t x) { return (double)x; }
FL_INLINE double to_double(bool x) { return x; }
FL_INLINE vw to_double(vf x) { return {__builtin_convertvector(lo_half(x), vd), __builtin_convertvector(hi_half(x), vd)}; }
FL_INLINE vw to_double(vw x) { return x; }
FL_INLINE vw to_double(vi x) { return {__builtin_convertvector(lo_half(x), vd), __builtin_convertvector(hi_half(x), vd)}; }
FL_INLINE vw to_double(vl x) { return {__builtin_convertvector(x.lo, vd), __builtin_convertvector(x.hi, vd)}; }
FL_INLINE vw to_double(vm x) { return to_double(x.m & 1); }
FL_INLINE vf to_float(vf x) { return x; }
FL_INLINE vf to_float(vi x) { return __builtin_convertvector(x, vf); }
FL_INLINE vf to_float(vl x) { return join(__builtin_convertvector(x.lo, vfh), __builtin_convertvector(x.hi, vfh)); }
FL_INLINE vf to_float(vm x) { return (vf)(x.m & 0x3f800000); }
FL_INLINE int32_t to_int32(float x) { return x > -2147483904.f && x < 2147483648.f ? (int32_t)x : INT32_MIN; }
FL_INLINE int32_t to_int32(int32_t x) { return x; }
FL_INLINE int32_t to_int32(int64_t x) { return (int32_t)x; }
FL_INLINE int32_t to_int32(bool x) { return x; }
FL_INLINE int32_t to_int32(double x) { return x > -2147483649.0 && x < 2147483648.0 ? (int32_t)x : INT32_MIN; }
FL_INLINE vi to_int32(vw x) {
  doubles a = unpack(x);
  vi r;
  for (int i = 0; i < VL; i++) r[i] = to_int32(a.x[i]);
  return r;
}
FL_INLINE vi to_int32(vf x) { return __builtin_convertvector(x, vi); }
FL_INLINE vi to_int32(vi x) { return x; }
FL_INLINE vi to_int32(vl x) { return join(__builtin_convertvector(x.lo, vih), __builtin_convertvector(x.hi, vih)); }
FL_INLINE vi to_int32(vm x) { return x.m & 1; }
FL_INLINE int64_t to_int64(float x) {
  return x >= -9223372036854775808.f && x < 9223372036854775808.f ? (int64_t)x : INT64_MIN;
}
FL_INLINE int64_t to_int64(double x) {
  return x >= -9223372036854775808.0 && x < 9223372036854775808.0 ? (int64_t)x : INT64_MIN;
}
FL_INLINE int64_t to_int64(int32_t x) { return x; }
FL_INLINE int64_t to_int64(int64_t x) { return x; }
FL_INLINE int64_t to_int64(bool x) { return x; }
FL_INLINE vl to_int64(vf x) { return {__builtin_convertvector(lo_half(x), vq), __builtin_convertvector(hi_half(x), vq)}; }
FL_INLINE vl to_int64(vw x) { return {__builtin_convertvector(x.lo, vq), __builtin_convertvector(x.hi, vq)}; }
FL_INLINE vl to_int64(vi x) { return {widen_lo(x), widen_hi(x)}; }
FL_INLINE vl to_int64(vl x) { return x; }
FL_INLINE vl to_int64(vm x) { return to_int64(x.m & 1); }
FL_INLINE bool to_bool(bool x) { return x; }
FL_INLINE bool to_bool(float x) { return x != 0.f; }
FL_INLINE bool to_bool(double x) { return x != 0.0; }
FL_INLINE vm to_bool(vw x) { return x != vw{}; }
FL_INLINE bool to_bool(int32_t x) { return x != 0; }
FL_INLINE bool to_bool(int64_t x) { return x != 0; }
FL_INLINE vm to_bool(vm x) { return x; }
FL_INLINE vm to_bool(vf x) { return vm(x != 0.f); }
FL_INLINE vm to_bool(vi x) { return vm(x != 0); }
FL_INLINE vm to_bool(vl x) { return x != vl{}; }
FL_INLINE bool isnan_(float x) { return x != x; }
FL_INLINE bool isnan_(double x) { return x != x; }
FL_INLINE vm isnan_(vw x) { return x != x; }
FL_INLINE vm isnan_(vf x) { return vm(x != x); }

// ---- floor division and modulo, as Python's; an integer divided by zero gives 0 for both

template <class T> FL_INLINE T floordiv_int(T a, T b) {
  if (b == 0) return 0;
  if (b == -1) return -a;  // the one quotient that overflows would trap
  T q = a / b;
  return q - ((a % b != 0) & ((a < 0) != (b < 0)));
}
template <class T> FL_INLINE T mod_int(T a, T b) { return b == 0 ? 0 : a - floordiv_int(a, b) * b; }
FL_INLINE vd floor_lanes(vd x) {  // |x| < 2^51
  vd t = (x + 6755399441055744.0) - 6755399441055744.0;
  return t > x ? t - 1.0 : t;
}
FL_INLINE vih floordiv_half(vih a, vih b) {  // int32 quotients are exact in double
  vd q = floor_lanes(__builtin_convertvector(a, vd) / __builtin_convertvector(b, vd));
  return __builtin_convertvector(__builtin_convertvector(q, vq), vih);
}
FL_INLINE int32_t floordiv_one(int32_t a, int32_t b) { return floordiv_int(a, b); }
FL_INLINE int64_t floordiv_one(int64_t a, int64_t b) { return floordiv_int(a, b); }
FL_INLINE vi floordiv_one(vi a, vi b) {
  vi zero = b == 0, safe = zero ? bc(1) : b;
  return zero ? vi{} : join(floordiv_half(lo_half(a), lo_half(safe)), floordiv_half(hi_half(a), hi_half(safe)));
}
FL_INLINE vl floordiv_one(vl a, vl b) {
  return each(a, b, [](int64_t x, int64_t y) { return floordiv_int(x, y); });
}
FL_INLINE int32_t mod_one(int32_t a, int32_t b) { return mod_int(a, b); }
FL_INLINE int64_t mod_one(int64_t a, int64_t b) { return mod_int(a, b); }
FL_INLINE vi mod_one(vi a, vi b) { return b == 0 ? vi{} : a - floordiv_one(a, b) * b; }
FL_INLINE vl mod_one(vl a, vl b) {
  return each(a, b, [](int64_t x, int64_t y) { return mod_int(x, y); });
}
FL_INLINE vd floor_any(vd x) { return (x < 0x1p51) & (x > -0x1p51) ? floor_lanes(x) : x; }
FL_INLINE vfh mod_half(vfh a, vfh b) {
  vd x = __builtin_convertvector(a, vd), y = __builtin_convertvector(b, vd);
  vd r = x - floor_any(x / y) * y;
  vd inf = bcd(__builtin_inf());
  vd endless = (x == 0.0) | ((x < 0.0) == (y < 0.0)) ? x : y;  // x % inf
  r = ((y == inf) | (y == -inf)) & (x < inf) & (x > -inf) ? endless : r;
  return __builtin_convertvector(r, vfh);
}
FL_INLINE vfh floordiv_float_half(vfh a, vfh b) {
  vd x = __builtin_convertvector(a, vd), y = __builtin_convertvector(b, vd), inf = bcd(__builtin_inf());
  vd q = floor_any(x / y);
  q = ((y == inf) | (y == -inf)) & (((x < 0.0) & (y > 0.0)) | ((x > 0.0) & (y < 0.0))) ? bcd(-1.0) : q;
  q = ((x == inf) | (x == -inf)) & (y != 0.0) ? bcd(__builtin_nan("")) : q;
  return __builtin_convertvector(q, vfh);
}
FL_INLINE vf floordiv_one(vf a, vf b) {
  return join(floordiv_float_half(lo_half(a), lo_half(b)), floordiv_float_half(hi_half(a), hi_half(b)));
}
FL_INLINE vf mod_one(vf a, vf b) { return join(mod_half(lo_half(a), lo_half(b)), mod_half(hi_half(a), hi_half(b))); }
FL_INLINE float floordiv_one(float a, float b) { return floordiv_one(bc(a), bc(b))[0]; }
FL_INLINE float mod_one(float a, float b) { return mod_one(bc(a), bc(b))[0]; }

template <class F> FL_INLINE vw each(vw a, vw b, F f) {
  doubles x = unpack(a), y = unpack(b);
  for (int i = 0; i < VL; i++) x.x[i] = f(x.x[i], y.x[i]);
  return repack(x);
}
FL_INLINE double mod_one(double a, double b) {
  double r = __builtin_fmod(a, b);
  return r != 0.0 && (b < 0.0) != (r < 0.0) ? r + b : r;
}
FL_INLINE double floordiv_one(double a, double b) {  // torch's: the rest first, so that no quotient is rounded up
  if (b == 0.0) return a / b;
  double r = __builtin_fmod(a, b), q = (a - r) / b;
  if (r != 0.0 && (b < 0.0) != (r < 0.0)) q -= 1.0;
  if (q == 0.0) return __builtin_copysign(0.0, a / b);
  double f = __builtin_floor(q);
  return q - f > 0.5 ? f + 1.0 : f;
}
FL_INLINE vw mod_one(vw a, vw b) {
  return each(a, b, [](double x, double y) { return mod_one(x, y); });
}
FL_INLINE vw floordiv_one(vw a, vw b) {
  return each(a, b, [](double x, double y) { return floordiv_one(x, y); });
}

// A constant power of two divides by a shift.
FL_INLINE bool is_power(int32_t b) { return b > 0 && (b & (b - 1)) == 0; }
FL_INLINE vi floordiv(vi a, int32_t b) {
  if (__builtin_constant_p(b) && is_power(b)) return a >> __builtin_ctz(b);
  return floordiv_one(a, bc(b));
}
FL_INLINE vi mod(vi a, int32_t b) {
  if (__builtin_constant_p(b) && is_power(b)) return a & (b - 1);
  return mod_one(a, bc(b));
}
template <class A, class B> FL_INLINE common<A, B> floordiv(A a, B b) {
  return floordiv_one(lift<common<A, B>>(a), lift<common<A, B>>(b));
}
template <class A, class B> FL_INLINE common<A, B> mod(A a, B b) {
  return mod_one(lift<common<A, B>>(a), lift<common<A, B>>(b));
}

// ---- functions: a scalar argument goes through one vector, so that both agree bit for bit

#define FL_FUNCTION(name, vector)               \
  FL_INLINE vf name(vf x) { return vector(x); } \
  FL_INLINE float name(float x) { return vector(bc(x))[0]; }
FL_FUNCTION(exp, vexp)
FL_FUNCTION(exp2, vexp2)
FL_FUNCTION(log, vlog)
FL_FUNCTION(log2, vlog2)
FL_FUNCTION(tanh, vtanh)
FL_FUNCTION(sigmoid, vsigmoid)
FL_FUNCTION(sqrt, vsqrt)
FL_FUNCTION(rsqrt, 1.f / vsqrt)
FL_FUNCTION(erf, verf)
FL_FUNCTION(sin, vsin)
FL_FUNCTION(cos, vcos)
FL_FUNCTION(floor, vfloor)
#undef FL_FUNCTION

// of doubles, where a variant's tensors are: lane by lane
#define FL_FUNCTION(name, ...)                            \
  FL_INLINE double name(double x) { return __VA_ARGS__; } \
  FL_INLINE vw name(vw x) {                               \
    return each(x, x, [](double a, double) { return name(a); }); \
  }
FL_FUNCTION(exp, __builtin_exp(x))
FL_FUNCTION(exp2, __builtin_exp2(x))
FL_FUNCTION(log, __builtin_log(x))
FL_FUNCTION(log2, __builtin_log2(x))
FL_FUNCTION(tanh, __builtin_tanh(x))
FL_FUNCTION(sigmoid, 1.0 / (1.0 + __builtin_exp(-x)))
FL_FUNCTION(sqrt, __builtin_sqrt(x))
FL_FUNCTION(rsqrt, 1.0 / __builtin_sqrt(x))
FL_FUNCTION(floor, __builtin_floor(x))
#undef FL_FUNCTION

}  // namespace flashloom

#include "loads.h"
