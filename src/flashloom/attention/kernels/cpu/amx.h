// Intel AMX: tiles of 16 rows x 64 bytes, and the few AVX-512 instructions around them that the extensions cannot say.
//
// Written as assembly: GCC 12's _tile_* macros carry no memory clobber, so that stores which feed a tile load may move past
// it. Accumulators tmm0..3 hold a 2 x 2 block of tiles [a0 b0, a0 b1, a1 b0, a1 b1]; tmm4,5 are A, tmm6,7 are B. In memory
// tiles are contiguous: the two of A, the two of B, and the four accumulators in the order a0 b0, a1 b0, a0 b1, a1 b1.
#pragma once
#include "vec.h"

namespace flashloom {

constexpr int TILE = 1024;  // bytes

struct alignas(64) TileShapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t columns[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// A thread's tile registers, and its float mode: a weight that underflows must not cost an assist of 150 cycles, so results
// below 2^-126 become 0 until the scope ends. The process has asked for the registers already (Target.supported).
struct TileScope {
  uint32_t mode;
  TileScope() {
    TileShapes shapes;
    asm volatile("ldtilecfg %0" ::"m"(shapes) : "memory");
    asm volatile("stmxcsr %0" : "=m"(mode));
    uint32_t flush = mode | 0x8040;
    asm volatile("ldmxcsr %0" ::"m"(flush) : "memory");
  }
  ~TileScope() {
    asm volatile("ldmxcsr %0" ::"m"(mode) : "memory");
    asm volatile("tilerelease" ::: "memory");
  }
};

// acc += A B in four parts, so that a caller can put other work between them: operands<I>, then product<I> for I = 0..3.
// A streams from L2 and is hinted past L1 (tileloaddt1), so that B and the accumulators' memory stay there.
template <int I> FL_INLINE void tile_operands(const char* a, const char* b) {
  if constexpr (I == 0)
    asm volatile("tileloaddt1 (%0,%2,1), %%tmm4\n\ttileloadd (%1,%2,1), %%tmm6" ::"r"(a), "r"(b), "r"(64L) : "memory");
  if constexpr (I == 1) asm volatile("tileloadd 1024(%0,%1,1), %%tmm7" ::"r"(b), "r"(64L) : "memory");
  if constexpr (I == 2) asm volatile("tileloaddt1 1024(%0,%1,1), %%tmm5" ::"r"(a), "r"(64L) : "memory");
}
template <int I> FL_INLINE void tile_product() {
  if constexpr (I == 0) asm volatile("tdpbf16ps %%tmm6, %%tmm4, %%tmm0" ::: "memory");
  if constexpr (I == 1) asm volatile("tdpbf16ps %%tmm7, %%tmm4, %%tmm1" ::: "memory");
  if constexpr (I == 2) asm volatile("tdpbf16ps %%tmm6, %%tmm5, %%tmm2" ::: "memory");
  if constexpr (I == 3) asm volatile("tdpbf16ps %%tmm7, %%tmm5, %%tmm3" ::: "memory");
}
// Accumulator I goes to its place in `done`, and starts from its place in `acc` or (null) from zero. Between operands and
// product the store hides behind the products of the other accumulators (a fifth faster than storing all four at the end).
template <int I> FL_INLINE void tile_restart(char* done, const char* acc) {
  constexpr int AT = I == 0 ? 0 : I == 1 ? 2 * TILE : I == 2 ? TILE : 3 * TILE;
  if constexpr (I == 0) asm volatile("tilestored %%tmm0, (%0,%1,1)" ::"r"(done + AT), "r"(64L) : "memory");
  if constexpr (I == 1) asm volatile("tilestored %%tmm1, (%0,%1,1)" ::"r"(done + AT), "r"(64L) : "memory");
  if constexpr (I == 2) asm volatile("tilestored %%tmm2, (%0,%1,1)" ::"r"(done + AT), "r"(64L) : "memory");
  if constexpr (I == 3) asm volatile("tilestored %%tmm3, (%0,%1,1)" ::"r"(done + AT), "r"(64L) : "memory");
  if (acc) {
    if constexpr (I == 0) asm volatile("tileloadd (%0,%1,1), %%tmm0" ::"r"(acc + AT), "r"(64L) : "memory");
    if constexpr (I == 1) asm volatile("tileloadd (%0,%1,1), %%tmm1" ::"r"(acc + AT), "r"(64L) : "memory");
    if constexpr (I == 2) asm volatile("tileloadd (%0,%1,1), %%tmm2" ::"r"(acc + AT), "r"(64L) : "memory");
    if constexpr (I == 3) asm volatile("tileloadd (%0,%1,1), %%tmm3" ::"r"(acc + AT), "r"(64L) : "memory");
  } else {
    if constexpr (I == 0) asm volatile("tilezero %%tmm0" ::: "memory");
    if constexpr (I == 1) asm volatile("tilezero %%tmm1" ::: "memory");
    if constexpr (I == 2) asm volatile("tilezero %%tmm2" ::: "memory");
    if constexpr (I == 3) asm volatile("tilezero %%tmm3" ::: "memory");
  }
}
FL_INLINE void tiles_store(char* done) {
  asm volatile(
      "tilestored %%tmm0, (%0,%1,1)\n\ttilestored %%tmm1, 2048(%0,%1,1)\n\t"
      "tilestored %%tmm2, 1024(%0,%1,1)\n\ttilestored %%tmm3, 3072(%0,%1,1)" ::"r"(done),
      "r"(64L)
      : "memory");
}

typedef uint16_t v32h __attribute__((vector_size(64)));  // 32 words of 16 bits
typedef uint16_t v32h_u __attribute__((vector_size(64), aligned(1), may_alias));

FL_INLINE vf tile_scale(vf x, vf n) {  // x 2^floor(n)
  vf r;
  asm("vscalefps %2, %1, %0" : "=v"(r) : "v"(x), "v"(n));
  return r;
}

// 2^x to 7.5e-5 relative (a fortieth of a bfloat16's rounding): 0 far below, inf far above, NaN for NaN.
FL_INLINE vf tile_exp2(vf x) {
  vf f;
  asm("vreduceps $9, %1, %0" : "=v"(f) : "v"(x));  // x - floor(x)
  vf p = bc(7.802452147e-2f);
  p = p * f + 2.260671556e-1f;
  p = p * f + 6.958335638e-1f;
  p = p * f + 9.999251962e-1f;
  return tile_scale(p, x);
}

// [a0..a15, b0..b15] as bfloat16
FL_INLINE v32h join_bf16(vf a, vf b) {
  v32h r;
  asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(r) : "v"(a), "v"(b));
  return r;
}
// Lane by lane in one dword: a in the low half, b in the high.
FL_INLINE v32h pair_bf16(vf a, vf b) {
  v32h r = join_bf16(a, b);
  return __builtin_shufflevector(r, r, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25, 10, 26, 11, 27,
                                 12, 28, 13, 29, 14, 30, 15, 31);
}

// sum += both halves of each dword
FL_INLINE void add_pairs(vf& sum, v32h pairs) {
  const vi ones = bc((int32_t)0x3f803f80);
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(pairs), "v"(ones));
}

// In place: the transpose of a 16 x 16 matrix of dwords, one vector per row.
FL_OUTLINE void transpose16(vi* r) {
  vi t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    t[2 * i] = __builtin_shufflevector(r[2 * i], r[2 * i + 1], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
    t[2 * i + 1] = __builtin_shufflevector(r[2 * i], r[2 * i + 1], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++)
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
      vi a = t[4 * i + j], b = t[4 * i + j + 2];
      r[4 * i + 2 * j] = __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
      r[4 * i + 2 * j + 1] = __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    }
#define FL_EVEN_QUARTERS(a, b) __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27)
#define FL_ODD_QUARTERS(a, b) __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31)
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    t[i] = FL_EVEN_QUARTERS(r[i], r[i + 4]), t[i + 4] = FL_ODD_QUARTERS(r[i], r[i + 4]);
    t[i + 8] = FL_EVEN_QUARTERS(r[i + 8], r[i + 12]), t[i + 12] = FL_ODD_QUARTERS(r[i + 8], r[i + 12]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    r[i] = FL_EVEN_QUARTERS(t[i], t[i + 8]), r[i + 8] = FL_ODD_QUARTERS(t[i], t[i + 8]);
    r[i + 4] = FL_EVEN_QUARTERS(t[i + 4], t[i + 12]), r[i + 12] = FL_ODD_QUARTERS(t[i + 4], t[i + 12]);
  }
#undef FL_EVEN_QUARTERS
#undef FL_ODD_QUARTERS
}

}  // namespace flashloom
