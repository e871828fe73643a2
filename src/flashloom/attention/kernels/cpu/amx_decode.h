// The two products of decode on AMX tiles, without packing anything.
//
// Scores: 16 keys of a page are the A operand as they lie, Q^T is B: S [16 keys][rows]. Values: 16 values of a page are the B
// operand as they lie. The instruction multiplies pairs, (a[2k], a[2k + 1]) with (b[k][2n], b[k][2n + 1]), and would have the
// pairs run over keys; here they run over the head dim, so a weight is given twice, as (p, 0) in one row of A and as (0, p) in
// another, and C has the even dims in one row and the odd ones in the other. That halves the use of each instruction and
// still costs less than interleaving the values of two keys. float8 keys and 8-bit values become bfloat16 in scratch (exactly);
// int8 keys are multiplied as they lie.
#pragma once
#include "args.h"

#if defined(__AMX_BF16__)
#include "amx.h"
#endif
#if defined(__AMX_BF16__) && defined(FL_AVX512) && defined(__AVX512VBMI__)
#define FL_TILES 1
#endif

namespace flashloom {

#if defined(FL_TILES)

// Assembly, because GCC 12's macros lack the memory clobber.
#define FL_TILE_LOAD(t, p, stride) \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #t ::"r"(p), "r"((int64_t)(stride)) : "memory")
#define FL_TILE_STORE(t, p, stride) \
  asm volatile("tilestored %%tmm" #t ", (%0,%1,1)" ::"r"(p), "r"((int64_t)(stride)) : "memory")
#define FL_TILE_ZERO(t) asm volatile("tilezero %%tmm" #t ::)
#define FL_TILE_DOT(c, a, b) asm volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c ::)
#define FL_TILE_DOT_BYTES(c, a, b) asm volatile("tdpbssd %%tmm" #b ", %%tmm" #a ", %%tmm" #c ::)

// ---- 8 bits to bfloat16: float8 by a table of the 128 codes without sign, as bytes in registers

constexpr uint16_t small_to_bf16(uint32_t magnitude, int exponent) {  // magnitude * 2^exponent, magnitude < 256
  if (magnitude == 0) return 0;
  int top = 0;
  while (magnitude >> (top + 1)) top++;
  return (uint16_t)((127 + exponent + top) << 7 | ((magnitude << 7 >> top) & 0x7f));
}
template <class T> constexpr uint16_t bf16_of(uint32_t code) {
  constexpr int mantissa = same<T, e4m3>::value ? 3 : 2, bias = same<T, e4m3>::value ? 7 : 15;
  uint16_t sign = (code & 0x80) << 8, field = (code & 0x7f) >> mantissa, fraction = code & ((1 << mantissa) - 1);
  if (mantissa == 3 && (code & 0x7f) == 0x7f) return sign | 0x7fc0;
  if (mantissa == 2 && field == 31) return sign | (fraction ? 0x7fc0 : 0x7f80);
  if (field == 0) return sign | small_to_bf16(fraction, 1 - bias - mantissa);
  return sign | (uint16_t)((field - bias + 127) << 7 | fraction << (7 - mantissa));
}
template <class T> struct ByteTable {
  alignas(64) uint8_t low[128] = {}, high[128] = {};
  constexpr ByteTable() {
    for (int i = 0; i < 128; i++) low[i] = bf16_of<T>(i) & 0xff, high[i] = bf16_of<T>(i) >> 8;
  }
};
template <class T> constexpr ByteTable<T> byte_table{};

typedef int8_t v64 __attribute__((vector_size(64)));
typedef int8_t v64_u __attribute__((vector_size(64), aligned(1), may_alias));
typedef int64_t v8q __attribute__((vector_size(64)));

FL_INLINE v64 look_up(v64 index, const uint8_t* table) {  // of 128 entries, by the low 7 bits
  asm("vpermi2b %2, %1, %0" : "+v"(index) : "v"(*(const v64*)table), "v"(*(const v64*)(table + 64)));
  return index;
}
template <class T> FL_INLINE void bytes_to_bf16(const void* from, int64_t at, int n, uint16_t* to) {
  constexpr const ByteTable<T>& table = byte_table<T>;
  for (int d = 0; d < n; d += 64) {
    v64 x{};
    if (d + 64 <= n) x = *(const v64_u*)((const int8_t*)from + at + d);
    else __builtin_memcpy(&x, (const int8_t*)from + at + d, 32);
    x = (v64)__builtin_shufflevector((v8q)x, (v8q)x, 0, 4, 1, 5, 2, 6, 3, 7);  // unpacking works within 16 bytes
    v64 low = look_up(x, table.low), high = look_up(x, table.high) | (x & (int8_t)0x80);
    v64 a, b;
    asm("vpunpcklbw %2, %1, %0" : "=v"(a) : "v"(low), "v"(high));
    asm("vpunpckhbw %2, %1, %0" : "=v"(b) : "v"(low), "v"(high));
    *(v64_u*)(to + d) = a;
    if (d + 64 <= n) *(v64_u*)(to + d + 32) = b;
  }
}
template <> FL_INLINE void bytes_to_bf16<s8>(const void* from, int64_t at, int n, uint16_t* to) {
  for (int d = 0; d < n; d += 32) *(v32h*)(to + d) = join_bf16(s8::block(from, at + d), s8::block(from, at + d + 16));
}
template <> FL_INLINE void bytes_to_bf16<bf16>(const void* from, int64_t at, int n, uint16_t* to) {
  for (int d = 0; d < n; d += 32) *(v64_u*)(to + d) = *(const v64_u*)((const uint16_t*)from + at + d);
}

// 16 rows of a matrix in memory, bfloat16: where they begin, and bytes from one to the next.
struct Strip { const void* p; int64_t stride; };

// s [64 keys][16] = K q for `groups` strips of 16 keys; q is [D / 32][16 pairs of dims][16 rows] bf16 pairs, or with BYTES
// [D / 64][16 quadruples of dims][16] int8, and s int32.
template <int D, bool BYTES, class F>
FL_INLINE void tile_scores(const Strip* k, int groups, const uint32_t* q, float* s, F& next) {
#define FL_DOT(c, a, b) if constexpr (BYTES) FL_TILE_DOT_BYTES(c, a, b); else FL_TILE_DOT(c, a, b)
  FL_TILE_ZERO(0);
  FL_TILE_ZERO(1);
  FL_TILE_ZERO(2);
  FL_TILE_ZERO(3);
  for (int c = 0; c < D / (BYTES ? 64 : 32); c++) {
    FL_TILE_LOAD(4, q + c * 256, 64);
    next.some();
    FL_TILE_LOAD(5, (const char*)k[0].p + c * 64, k[0].stride);
    FL_DOT(0, 5, 4);
    if (groups < 2) continue;
    next.some();
    FL_TILE_LOAD(6, (const char*)k[1].p + c * 64, k[1].stride);
    FL_DOT(1, 6, 4);
    if (groups < 3) continue;
    next.some();
    FL_TILE_LOAD(5, (const char*)k[2].p + c * 64, k[2].stride);
    FL_DOT(2, 5, 4);
    if (groups < 4) continue;
    next.some();
    FL_TILE_LOAD(6, (const char*)k[3].p + c * 64, k[3].stride);
    FL_DOT(3, 6, 4);
  }
  FL_TILE_STORE(0, s, 64);
  FL_TILE_STORE(1, s + 256, 64);
  FL_TILE_STORE(2, s + 512, 64);
  FL_TILE_STORE(3, s + 768, 64);
#undef FL_DOT
}

// o [DV / 32][16][16] = p v; p is [groups][16][16 keys] bf16 pairs.
template <int DV, class F> FL_INLINE void tile_values(const Strip* v, int groups, const uint32_t* p, float* o, F& next) {
  for (int c = 0; c < DV / 32; c += 4) {
    FL_TILE_ZERO(0);
    FL_TILE_ZERO(1);
    FL_TILE_ZERO(2);
    FL_TILE_ZERO(3);
    for (int i = 0; i < groups; i++) {
      const char* x = (const char*)v[i].p + c * 64;
      FL_TILE_LOAD(4, p + i * 256, 64);
      next.some();
      FL_TILE_LOAD(5, x, v[i].stride);
      FL_TILE_DOT(0, 4, 5);
      if (c + 1 < DV / 32) {
        next.some();
        FL_TILE_LOAD(6, x + 64, v[i].stride);
        FL_TILE_DOT(1, 4, 6);
      }
      if (c + 2 < DV / 32) {
        next.some();
        FL_TILE_LOAD(5, x + 128, v[i].stride);
        FL_TILE_DOT(2, 4, 5);
      }
      if (c + 3 < DV / 32) {
        next.some();
        FL_TILE_LOAD(6, x + 192, v[i].stride);
        FL_TILE_DOT(3, 4, 6);
      }
    }
    FL_TILE_STORE(0, o + c * 256, 64);
    if (c + 1 < DV / 32) FL_TILE_STORE(1, o + (c + 1) * 256, 64);
    if (c + 2 < DV / 32) FL_TILE_STORE(2, o + (c + 2) * 256, 64);
    if (c + 3 < DV / 32) FL_TILE_STORE(3, o + (c + 3) * 256, 64);
  }
}

// The first `rows` columns of s [16 keys][16] as rows of `to`, 16 keys each, times scale.
FL_INLINE void scores_by_row(const float* s, int rows, float scale, float* to, int64_t to_row) {
  if (rows > 4) {
    float t[256];
    transpose_block(s, 16, t, 16);
    for (int i = 0; i < rows; i++) storeu(to + i * to_row, loadu(t + i * 16) * scale);
    return;
  }
  typedef float v4 __attribute__((vector_size(16), aligned(4), may_alias));
  vf x[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {  // keys i, i + 4, i + 8, i + 12
    const float* y = s + i * 16;
    auto a = __builtin_shufflevector(*(const v4*)y, *(const v4*)(y + 64), 0, 1, 2, 3, 4, 5, 6, 7);
    auto b = __builtin_shufflevector(*(const v4*)(y + 128), *(const v4*)(y + 192), 0, 1, 2, 3, 4, 5, 6, 7);
    x[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15) * scale;
  }
#define FL_LOW(a, b) __builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29)
#define FL_HIGH(a, b) __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31)
  vf ac = FL_LOW(x[0], x[2]), bd = FL_LOW(x[1], x[3]), ef = FL_HIGH(x[0], x[2]), gh = FL_HIGH(x[1], x[3]);
  storeu(to, FL_LOW(ac, bd));
  if (rows > 1) storeu(to + to_row, FL_HIGH(ac, bd));
  if (rows > 2) storeu(to + 2 * to_row, FL_LOW(ef, gh));
  if (rows > 3) storeu(to + 3 * to_row, FL_HIGH(ef, gh));
#undef FL_LOW
#undef FL_HIGH
}

// Weights of one row for 16 keys, given once as (p, 0) and once as (0, p).
FL_INLINE void weights_to_tile(vf p, uint32_t* even, uint32_t* odd) {
  vu u = (vu)p + 0x8000;  // nearest bfloat16
  *(vi_u*)even = (vi)(u >> 16), *(vi_u*)odd = (vi)(u & 0xffff0000u);
}

#endif

}  // namespace flashloom
