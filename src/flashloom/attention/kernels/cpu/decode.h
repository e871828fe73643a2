// Few rows (decode, a few speculated tokens): bound by reading keys and values once.
//
// All heads of an item pass over a block of keys before the next one is touched, so that pages are read from end to end
// (with tokens outermost a head's rows are kilobytes apart, and each would be a new DRAM page and a new TLB entry). Lanes
// are the head dim in both products; a register block of rows x keys keeps each loaded vector busy, and the sums across
// lanes of VL scores cost one tree of shuffles. In between lanes are keys.
#pragma once
#include "amx_decode.h"
#include "finish.h"

// Set by a tuned config (config.py): decode without AMX tiles, and another number of keys of a block (a multiple of 32).
#if !defined(FL_VECTOR_DECODE)
#define FL_VECTOR_DECODE 0
#endif
#if !defined(FL_DECODE_KEYS)
#define FL_DECODE_KEYS 0
#endif

namespace flashloom {

template <class C, class V> struct DecodeKernel {
  typedef typename V::Params Params;
  typedef typename C::KV KV;
  typedef Finish<C, V> End;
  static constexpr int D = C::DIM, DV = C::VALUE_DIM, G = C::GROUP;
  static constexpr int DP = round_up(D, 2 * VL), DVP = round_up(End::DVP, 2 * VL);
  static constexpr int MAX_ROWS = 16;
  static constexpr bool DIRECT_K = D % (2 * VL) == 0 && !V::has_key, DIRECT_V = DV % (2 * VL) == 0;
#if defined(FL_TILES)
  static constexpr bool TILED = !FL_VECTOR_DECODE && same<typename C::Q, bf16>::value && (sizeof(typename KV::raw) == 1 || same<KV, bf16>::value) &&
                                D % 32 == 0 && DV % 32 == 0 && !V::has_key;
  static constexpr int TILE_ROWS = 8;                        // rows of one tile of weights, each in it twice
  // int8 keys are multiplied as they are, by two digits of each query relative to its largest element (15 bits)
  static constexpr bool DIGITS = TILED && same<KV, s8>::value && D % 64 == 0;
  static constexpr int QUERIES = V::has_query && !DIGITS ? 2 : 1;  // transformed queries are the sum of two bfloat16
  static constexpr int TILE_STEPS = D / (DIGITS ? 64 : 32) + DV / 32;  // tiles of 16 keys and of their values
#else
  static constexpr bool TILED = false;
  static constexpr int TILE_STEPS = 1;
#endif
  static constexpr int BLOCK = FL_DECODE_KEYS ? FL_DECODE_KEYS : TILED ? 64 : 32;  // keys
  static constexpr bool ZIPPED_K = DIRECT_K && pair<KV>::interleaved;
  static constexpr bool ZIPPED_V = TILED || (DIRECT_V && pair<KV>::interleaved);

  struct Row {
    float q[DP];   // times sm_scale (and log2 e, and the key's scale, where nothing comes between)
    float o[DVP];
    float l[VL];   // partial sums
    float m, unit;  // unit: of the digits
    alignas(64) uint32_t tiles[TILED ? D * 8 : 16];  // of the first row of TILE_ROWS: Q^T, bf16 pairs
  };
  struct Scratch {
    float s[MAX_ROWS * BLOCK];
    float k[DIRECT_K ? VL : BLOCK * DP], v[DIRECT_V ? VL : BLOCK * DVP];
    float transformed[DP];
    int64_t k_at[BLOCK], v_at[BLOCK], k_in[BLOCK], v_in[BLOCK];
    float k_scale[BLOCK], v_scale[BLOCK];
#if defined(FL_TILES)
    struct Tiles {
      alignas(64) float s[BLOCK * 16], o[DV * 8 > 512 ? DV * 8 : 512];
      alignas(64) uint32_t p[BLOCK * 16];
      alignas(64) uint16_t k[BLOCK * D], v[BLOCK * DV];  // what cannot be used where it is
      Strip k_at[BLOCK / 16], v_at[BLOCK / 16];
    };
    typename choose<TILED, Tiles, char>::type tiles;
#endif
    alignas(64) Row rows[1];  // [head][row]
  };
  static constexpr int64_t scratch_size(int64_t rows) { return sizeof(Scratch) + rows * (int64_t)sizeof(Row); }

  // Touches the lines of the next block, a few at a time between the products of this one: one line of each quarter of its keys
  // and of their values in turn, in the order of memory within a quarter. The processor runs ahead in each of these eight
  // streams; with two the same bytes take a fifth longer.
  struct Fetcher {
    static constexpr int APART = BLOCK / 4;  // keys
    const char *k, *v;
    const int64_t *k_at, *v_at;  // in bytes
    int row, rows, line, k_lines, v_lines, quota;
    bool together;  // a token's heads lie side by side and are read in one go
    FL_INLINE void begin(const DecodeKernel& d, int32_t kv_head) {
      if (together && kv_head != d.it.kv_head_lo) return;
      constexpr int64_t BYTES = sizeof(typename KV::raw);
      k = (const char*)d.a.k + kv_head * d.a.k_head * BYTES, v = (const char*)d.a.v + kv_head * d.a.v_head * BYTES;
      row = line = 0;
    }
    FL_INLINE void some() {
      for (int i = 0; i < quota && row < min_of(rows, APART); i++) {
        for (int j = row; j < rows; j += APART) {
          if (line < k_lines) prefetch(k + k_at[j] + line * 64);
          if (line < v_lines) prefetch(v + v_at[j] + line * 64);
        }
        if (++line >= k_lines && line >= v_lines) line = 0, row++;
      }
    }
  };

  const Args& a;
  const Params& p;
  Scratch& w;
  const Item& it;
  Request r;
  int rows;
  Fetcher next;
  bool k_even[BLOCK / 16], v_even[BLOCK / 16];  // 16 keys evenly apart

  DecodeKernel(const Args& a, const Params& p, char* scratch, const Item& it)
      : a(a), p(p), w(*(Scratch*)scratch), it(it), r(a, it.request), rows(it.row_hi - it.row_lo) {}

  static FL_INLINE float factor(const Args& a) { return (float)a.sm_scale * (V::softmax && !V::has_logits ? LOG2E : 1.f); }

  FL_OUTLINE void load_query(Row& x, int32_t kv_head, int32_t row) {
    int32_t q_head = kv_head * G + row % G;
    int64_t from = r.batch * a.q_request + (r.q_start + row / G) * a.q_token + q_head * a.q_head;
    row_to_float<typename C::Q>(a.q, from, D, V::has_query ? w.transformed : x.q);
    if constexpr (V::has_query) V::transform_query(w.transformed, x.q, r.at(kv_head, q_head, row / G), p);
    for (int d = round_up(D, VL); d < DP; d += VL) storeu(x.q + d, vf{});
    for (int d = D; d < DP; d++) x.q[d] = 0.f;
    float scale = factor(a);
    if (!TILED)
    for (int d = 0; d < DP; d += 2 * VL) {
      vf u = loadu(x.q + d) * scale, v = loadu(x.q + d + VL) * scale;
      storeu(x.q + d, ZIPPED_K ? evens(u, v) : u), storeu(x.q + d + VL, ZIPPED_K ? odds(u, v) : v);
    }
    for (int d = 0; d < DVP; d += VL) storeu(x.o + d, vf{});
    storeu(x.l, vf{});
    x.m = -__builtin_inff();
  }

  // Where this head's keys and values of the block are; what cannot be read directly is made float32 in scratch.
  FL_OUTLINE void load_keys(int32_t kv_head, int32_t t, int n) {
    for (int i = 0; i < n; i++) w.k_in[i] = w.k_at[i] + kv_head * a.k_head, w.v_in[i] = w.v_at[i] + kv_head * a.v_head;
    if (a.k_scale) key_scales(a, r, t, n, a.k_scale, a.k_scale_page, kv_head * a.k_scale_head, w.k_scale);
    if (a.v_scale) key_scales(a, r, t, n, a.v_scale, a.v_scale_page, kv_head * a.v_scale_head, w.v_scale);
    if constexpr (TILED) {  // weights of keys beyond the last are 0 and must stay so
      for (int i = n; a.v_scale && i < round_up(n, VL); i++) w.v_scale[i] = 0.f;
      return;
    }
    if constexpr (!DIRECT_K) {
      for (int i = 0; i < n; i++) {
        float* to = V::has_key ? w.transformed : w.k + i * DP;
        row_to_float<KV>(a.k, w.k_in[i], D, to);
        if constexpr (V::has_key) {
          if (a.k_scale)
            for (int d = 0; d < round_up(D, VL); d += VL) storeu(to + d, loadu(to + d) * w.k_scale[i]);
          KeysAt at = r.at(kv_head, 0, 0);
          at.kv_pos = t + i;
          V::transform_key(to, w.k + i * DP, at, p);
        }
        for (int d = D; d < DP; d++) w.k[i * DP + d] = 0.f;
        w.k_in[i] = i * DP;
      }
    }
    if constexpr (!DIRECT_V) {
      for (int i = 0; i < n; i++) {
        row_to_float<KV>(a.v, w.v_in[i], DV, w.v + i * DVP);
        w.v_in[i] = i * DVP;
      }
    }
    for (int i = n; i < round_up(n, VL); i++) w.k_in[i] = w.k_in[n - 1];
  }

  // The scores of ROWS rows with VL / ROWS keys.
  template <class T, int ROWS> FL_INLINE void scores(const void* k, const int64_t* in, const Row* x, float* s) {
    constexpr int KEYS = VL / ROWS;
    vf sum[VL] = {};
    for (int d = 0; d < DP; d += 2 * VL) {
      vf q[ROWS][2];
#pragma GCC unroll 4
      for (int i = 0; i < ROWS; i++) q[i][0] = loadu(x[i].q + d), q[i][1] = loadu(x[i].q + d + VL);
#pragma GCC unroll 16
      for (int j = 0; j < KEYS; j++) {
        vf u, v;
        pair<T>::load(k, in[j] + d, u, v);
#pragma GCC unroll 4
        for (int i = 0; i < ROWS; i++) sum[i * KEYS + j] += u * q[i][0], sum[i * KEYS + j] += v * q[i][1];
      }
    }
    float all[VL];
    storeu(all, sums(sum));
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; i++) __builtin_memcpy(s + i * BLOCK, all + i * KEYS, KEYS * 4);
  }
  template <int ROWS> FL_INLINE void score_rows(const Row* x, float* s, int n) {
    for (int j = 0; j < n; j += VL / ROWS) {
      next.some();
      if constexpr (DIRECT_K) scores<KV, ROWS>(a.k, w.k_in + j, x, s + j);
      else scores<f32, ROWS>(w.k, w.k_in + j, x, s + j);
    }
  }

  // o of ROWS rows, a chunk of dims at a time in registers
  template <class T, int ROWS> FL_INLINE void values(const void* v, Row* x, const float* s, const float* shrink, int n) {
    constexpr int PAIRS = VL == 16 ? 2 : VL == 8 && ROWS > 1 ? 1 : 1;
    for (int d = 0; d < DVP; d += 2 * VL * PAIRS) {
      vf o[ROWS][PAIRS][2];
#pragma GCC unroll 4
      for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 2
        for (int c = 0; c < PAIRS; c++) {
          if (d + c * 2 * VL >= DVP) continue;
          o[i][c][0] = loadu(x[i].o + d + c * 2 * VL) * shrink[i], o[i][c][1] = loadu(x[i].o + d + c * 2 * VL + VL) * shrink[i];
        }
      for (int64_t j = 0; j < n; j++) {  // 64 bits: with -fwrapv an int index costs an extension each time
        vf y[PAIRS][2];
#pragma GCC unroll 2
        for (int c = 0; c < PAIRS; c++)
          if (d + c * 2 * VL < DVP) pair<T>::load(v, w.v_in[j] + d + c * 2 * VL, y[c][0], y[c][1]);
#pragma GCC unroll 4
        for (int i = 0; i < ROWS; i++) {
          vf b = bc(s[i * BLOCK + j]);
#pragma GCC unroll 2
          for (int c = 0; c < PAIRS; c++) o[i][c][0] += b * y[c][0], o[i][c][1] += b * y[c][1];
        }
      }
#pragma GCC unroll 4
      for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 2
        for (int c = 0; c < PAIRS; c++) {
          if (d + c * 2 * VL >= DVP) continue;
          storeu(x[i].o + d + c * 2 * VL, o[i][c][0]), storeu(x[i].o + d + c * 2 * VL + VL, o[i][c][1]);
        }
    }
  }
  template <int ROWS> FL_INLINE void value_rows(Row* x, const float* s, const float* shrink, int n) {
    if constexpr (DIRECT_V) values<KV, ROWS>(a.v, x, s, shrink, n);
    else values<f32, ROWS>(w.v, x, s, shrink, n);
  }

  // One row's scores become weights; answers by how much what it has summed so far shrinks.
  FL_OUTLINE float softmax(Row& x, float* s, int32_t kv_head, int32_t row, int32_t t, int n, bool masked) {
    KeysAt at = r.at(kv_head, kv_head * G + row % G, row / G);
    auto logits = V::bind_logits(at, p);
    auto mask = V::bind_mask(at, p);
    const vf out = bc(V::softmax ? -__builtin_inff() : 0.f);
    vf best = bc(-__builtin_inff());
    for (int j = 0; j < n; j += VL) {
      vf y = loadu(s + j);
      vi kv_pos = iota() + (t + j);
      if (a.k_scale && !V::has_key) y *= loadu(w.k_scale + j);
      if (V::has_logits) y = logits(y, kv_pos);
      if (V::has_logits && V::softmax) y *= LOG2E;
      if (V::has_mask && masked) y = where(mask(kv_pos), y, out);
      if (j + VL > n) y = kv_pos < t + n ? y : out;
      storeu(s + j, y);
      best = fast_max(best, y);
    }
    float shrink = 1.f;
    if (V::softmax) {
      float m = x.m, top = max_lanes(best)[0];
      top = top > m ? top : m;
      float base = top == -__builtin_inff() ? 0.f : top;
      vf l = loadu(x.l);
      if (top != m) {
        shrink = fast_exp2(bc(m - base))[0];
        l *= shrink;
        x.m = top;
      }
      for (int j = 0; j < n; j += VL) {
        vf e = fast_exp2(loadu(s + j) - base);
        l += e;
        storeu(s + j, e);
      }
      storeu(x.l, l);
    }
    if (a.v_scale)
      for (int j = 0; j < n; j += VL) storeu(s + j, loadu(s + j) * loadu(w.v_scale + j));
    return shrink;
  }

  template <int ROWS> FL_OUTLINE void attend_rows(Row* x, int32_t kv_head, int32_t row, int32_t t, int n, bool masked) {
    float shrink[ROWS];
    score_rows<ROWS>(x, w.s, n);
    for (int i = 0; i < ROWS; i++) shrink[i] = softmax(x[i], w.s + i * BLOCK, kv_head, row + i, t, n, masked);
    value_rows<ROWS>(x, w.s, shrink, n);
  }

#if defined(FL_TILES)
  // Q^T of up to TILE_ROWS rows, from their float queries; a transformed query's rounding error goes into further columns.
  FL_OUTLINE void tile_query(Row* x, int count) {
    for (int c = 0; c < D; c += 32) {
      float pairs[256] = {}, turned[256];
      for (int i = 0; i < count; i++) {
        for (int half = 0; half < 32; half += 16) {
          vf y = loadu(x[i].q + c + half);
          vh high = float_to_bf16(y);
          *(vh_u*)((uint16_t*)pairs + i * 32 + half) = high;
          if (QUERIES == 2) *(vh_u*)((uint16_t*)pairs + (count + i) * 32 + half) = float_to_bf16(y - bf16_to_float(high));
        }
      }
      transpose_block(pairs, 16, turned, 16);
      for (int i = 0; i < 256; i += VL) *(vi_u*)(x->tiles + c * 8 + i) = (vi)loadu(turned + i);
    }
  }

  // Column i of each [16 quadruples of dims][16] is the high digit (times 128) of row i, column count + i the low one.
  FL_OUTLINE void digit_query(Row* x, int count) {
    typedef int8_t v16 __attribute__((vector_size(16)));
    for (int i = 0; i < D * 4; i += VL) *(vi_u*)(x->tiles + i) = vi{};
    for (int i = 0; i < count; i++) {
      vf top{}, bad{};  // what is not finite makes the unit NaN
      for (int d = 0; d < D; d += VL) {
        vf y = loadu(x[i].q + d);
        top = fast_max(vabs(y), top), bad += y * 0.f;
      }
      const float most = max_of(max_lanes(top)[0], 1e-30f), inverse = 16256.f / most;
      x[i].unit = most / 16256.f + sum_lanes(bad)[0];
      for (int d = 0; d < D; d += VL) {
        vf n = round_even(loadu(x[i].q + d) * inverse), high = round_even(n * 0x1p-7f), low = n - high * 128.f;
        uint32_t* to = x->tiles + d / 64 * 256 + d % 64 * 4 + i;
        struct { uint32_t x[4]; } h, l;
        *(v16*)&h = __builtin_convertvector(__builtin_convertvector(high, vi), v16);
        *(v16*)&l = __builtin_convertvector(__builtin_convertvector(low, vi), v16);
        for (int j = 0; j < 4; j++) to[j * 16] = h.x[j], to[j * 16 + count] = l.x[j];
      }
    }
  }
  // The digits' sums of 16 keys become scores.
  FL_INLINE void join_digits(float* s, int count, vf unit) {
    const vi low = (iota() + count) & 15;
    for (int j = 0; j < 16; j++) {
      vf y = __builtin_convertvector(*(const vi_u*)(s + j * 16), vf);
      storeu(s + j * 16, (y * 128.f + __builtin_shuffle(y, low)) * unit);
    }
  }

  // Each 16 keys where they are, if they are evenly apart, and in scratch otherwise (with zeros beyond the last).
  template <int N, bool AS_IS> FL_INLINE void strips(const void* base, const int64_t* at, int64_t token, const bool* even, int n,
                                                     uint16_t* copy, Strip* to) {
    for (int i = 0; i * 16 < n; i++) {
      if (AS_IS && even[i]) {
        to[i] = {(const typename KV::raw*)base + at[i * 16], token * (int64_t)sizeof(typename KV::raw)};
        continue;
      }
      uint16_t* rows = copy + i * 16 * N;
      if constexpr (AS_IS && sizeof(typename KV::raw) == 1) {
        for (int j = 0; j < 16; j++) {
          if (i * 16 + j < n) __builtin_memcpy((char*)rows + j * N, (const char*)base + at[i * 16 + j], N);
          else __builtin_memset((char*)rows + j * N, 0, N);
        }
        to[i] = {rows, N};
        continue;
      }
      for (int j = 0; j < 16; j++) {
        if (i * 16 + j < n) bytes_to_bf16<KV>(base, at[i * 16 + j], N, rows + j * N);
        else __builtin_memset(rows + j * N, 0, N * 2);
      }
      to[i] = {rows, N * 2};
    }
  }

  FL_OUTLINE void attend_tiles(Row* x, int count, int32_t kv_head, int32_t row, int32_t t, int n, bool masked) {
    auto& z = w.tiles;
    const int groups = (n + 15) / 16;
    tile_scores<D, DIGITS>(z.k_at, groups, x->tiles, z.s, next);
    const float scale = DIGITS ? 1.f : factor(a);
    vf unit{};
    for (int i = 0; DIGITS && i < count; i++) unit[i] = x[i].unit * factor(a);
    for (int i = 0; i < groups; i++) {
      if (DIGITS) join_digits(z.s + i * 256, count, unit);
      if (QUERIES == 2)
        for (int j = 0; j < 16; j++) {
          float* s = z.s + (i * 16 + j) * 16;
          for (int k = 0; k < count; k++) s[k] += s[count + k];
        }
      scores_by_row(z.s + i * 256, count, scale, w.s + i * 16, BLOCK);
    }
    float shrink[TILE_ROWS];
    for (int i = 0; i < count; i++) {
      float* s = w.s + i * BLOCK;
      shrink[i] = softmax(x[i], s, kv_head, row + i, t, n, masked);
      for (int j = 0; j < groups; j++)
        weights_to_tile(loadu(s + j * 16), z.p + j * 256 + i * 16, z.p + j * 256 + (count + i) * 16);
    }
    tile_values<DV>(z.v_at, groups, z.p, z.o, next);
    for (int i = 0; i < count; i++) {
      float* o = x[i].o;
      for (int c = 0; c < DV; c += 32) {
        storeu(o + c, loadu(o + c) * shrink[i] + loadu(z.o + c * 8 + i * 16));
        storeu(o + c + 16, loadu(o + c + 16) * shrink[i] + loadu(z.o + c * 8 + (count + i) * 16));
      }
    }
  }
#endif

  FL_INLINE void attend(int32_t kv_head, int32_t t, int n, bool masked) {
    Row* x = w.rows + (kv_head - it.kv_head_lo) * rows;
#if defined(FL_TILES)
    if constexpr (TILED) {
      strips<D, DIGITS || same<KV, bf16>::value>(a.k, w.k_in, a.k_token, k_even, n, w.tiles.k, w.tiles.k_at);
      strips<DV, same<KV, bf16>::value>(a.v, w.v_in, a.v_token, v_even, n, w.tiles.v, w.tiles.v_at);
      for (int i = 0; i < rows; i += TILE_ROWS)
        attend_tiles(x + i, min_of(TILE_ROWS, rows - i), kv_head, it.row_lo + i, t, n, masked);
    }
#endif
    if constexpr (!TILED) attend_vectors(x, kv_head, t, n, masked);
  }

  FL_INLINE void attend_vectors(Row* x, int32_t kv_head, int32_t t, int n, bool masked) {
    constexpr int MOST = VL >= 16 ? 4 : 2;  // rows in registers: those of one token come in multiples of G
    int i = 0;
    if constexpr (G >= MOST)
      for (; i + MOST <= rows; i += MOST) attend_rows<MOST>(x + i, kv_head, it.row_lo + i, t, n, masked);
    if constexpr (MOST > 2 && G % MOST != 0 && G != 1)
      for (; i + 2 <= rows; i += 2) attend_rows<2>(x + i, kv_head, it.row_lo + i, t, n, masked);
    if constexpr (G % 2 != 0)
      for (; i < rows; i++) attend_rows<1>(x + i, kv_head, it.row_lo + i, t, n, masked);
  }

  // The block at t is next; some() will be called `calls` times for each head until then.
  FL_OUTLINE void look_ahead(int64_t* k_next, int64_t* v_next, int32_t t, int32_t end, int calls) {
    constexpr int BYTES = sizeof(typename KV::raw);
    const int heads = it.kv_head_hi - it.kv_head_lo;
    next.together = a.k_head < a.k_token && a.v_head < a.v_token;
    next.rows = max_of(0, min_of(BLOCK, end - t));
    key_offsets(a, r, t, next.rows, a.k_page * BYTES, a.k_token * BYTES, k_next);
    key_offsets(a, r, t, next.rows, a.v_page * BYTES, a.v_token * BYTES, v_next);
    next.k_lines = (int)((next.together ? heads * a.k_head : D) * BYTES + 63) / 64;
    next.v_lines = (int)((next.together ? heads * a.v_head : DV) * BYTES + 63) / 64;
    if (next.together && calls > 1) calls *= heads;
    next.quota = (min_of(next.rows, Fetcher::APART) * max_of(next.k_lines, next.v_lines) + calls - 1) / calls;
  }

  void run() {
    const int32_t heads = it.kv_head_hi - it.kv_head_lo;
    const int32_t start = next_block<C, V>(r, p, it, it.kv_lo, it.kv_hi);
    if (V::softmax && it.splits > 1 && start >= it.kv_hi) {  // out of a window
      End::give_nothing(a, it);
      End::item(a, p, r, it);
      return;
    }
    for (int32_t h = it.kv_head_lo; h < it.kv_head_hi; h++)
      for (int i = 0; i < rows; i++) load_query(w.rows[(h - it.kv_head_lo) * rows + i], h, it.row_lo + i);
#if defined(FL_TILES)
    typename choose<TILED, TileScope, char>::type scope;
    (void)scope;
    if constexpr (TILED) {
      for (int i = 0; i < BLOCK * 16; i += VL) *(vi_u*)(w.tiles.p + i) = vi{};
      for (int32_t h = 0; h < heads; h++)
        for (int i = 0; i < rows; i += TILE_ROWS) {
          if constexpr (DIGITS) digit_query(w.rows + h * rows + i, min_of(TILE_ROWS, rows - i));
          else tile_query(w.rows + h * rows + i, min_of(TILE_ROWS, rows - i));
        }
    }
#endif
    int64_t k_next[BLOCK], v_next[BLOCK];
    next.k_at = k_next, next.v_at = v_next;
    // nothing to compute yet: all of the first block at once
    look_ahead(k_next, v_next, start, it.kv_hi, 1);
    for (int32_t h = it.kv_head_lo; h < it.kv_head_hi; h++) next.begin(*this, h), next.some();
    for (int32_t t = start; (t = next_block<C, V>(r, p, it, t, it.kv_hi)) < it.kv_hi; t += BLOCK) {
      int n = min_of(BLOCK, it.kv_hi - t);
      key_offsets(a, r, t, n, a.k_page, a.k_token, w.k_at);
      key_offsets(a, r, t, n, a.v_page, a.v_token, w.v_at);
      if constexpr (TILED) mark_even(w.k_at, a.k_token, n, k_even), mark_even(w.v_at, a.v_token, n, v_even);
      look_ahead(k_next, v_next, t + BLOCK, it.kv_hi, TILED ? (n + 15) / 16 * TILE_STEPS : (n * rows + VL - 1) / VL);
      for (int32_t h = it.kv_head_lo; h < it.kv_head_hi; h++) {
        next.begin(*this, h);
        int keep = verdict<C, V>(r, p, h, it.row_lo, it.row_hi, t, t + n);
        if (keep == 0) continue;
        load_keys(h, t, n);
        attend(h, t, n, keep == 1);
      }
    }
    for (int32_t h = it.kv_head_lo; h < it.kv_head_hi; h++) {
      for (int i = 0; i < rows; i++) {
        Row& x = w.rows[(h - it.kv_head_lo) * rows + i];
        if (ZIPPED_V) {
          for (int d = 0; d < DVP; d += 2 * VL) {
            vf u = loadu(x.o + d), v = loadu(x.o + d + VL);
            storeu(x.o + d, zip_lo(u, v)), storeu(x.o + d + VL, zip_hi(u, v));
          }
        }
        End::give(a, p, r, it, h, it.row_lo + i, x.o, x.m, sum_lanes(loadu(x.l))[0]);
      }
    }
    End::item(a, p, r, it);
  }

  static FL_INLINE void mark_even(const int64_t* at, int64_t token, int n, bool* even) {
    for (int i = 0; i * 16 < n; i++) {
      even[i] = i * 16 + 16 <= n;
      for (int j = 1; even[i] && j < 16; j++) even[i] = at[i * 16 + j] == at[i * 16] + j * token;
    }
  }
};

}  // namespace flashloom
