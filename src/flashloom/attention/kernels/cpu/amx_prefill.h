// Many rows of bfloat16 queries on AMX: a flash attention whose matrix unit and vector unit work at the same time.
//
// Everything is transposed, S^T = K Q^T and O^T = V^T P^T, so that lanes are rows and the softmax has no horizontal
// operations. 32 rows pass over steps of 32 keys. While the vectors turn the scores of one step into weights, the matrix unit
// makes the scores of the next step and adds the weights of the four steps before to the output: one 2 x 2 block of tile
// products (64 cycles) per few vectors of weights, near enough in the instruction stream for the processor to overlap them.
// Keys and values are packed into tiles block by block (L2); scores and weights stay in L1.
//
// There is no running maximum. The reference point of a row is set by its first step, exp2 has room for 2^60 above it, and a
// step whose sum exceeds that is done again with a new one. Reference points are integers (in log2): rescaling what has been
// summed is exact. Steps go from the last key to the first, where causal rows and position biases have their largest logits.
#pragma once
#include "amx_pack.h"
#include "finish.h"

namespace flashloom {

template <class C, class V> struct AmxKernel {
  typedef typename V::Params Params;
  typedef Finish<C, V> End;
  typedef Packer<C, V> Pack;
  static constexpr bool SERVES = same<typename C::Q, bf16>::value && !same<typename C::KV, f32>::value;
  static constexpr int G = C::GROUP, VALUE_DIM = C::VALUE_DIM, DK = Pack::DK, DV = Pack::DV;
  static constexpr int ROWS = 32, SUB = ROWS;  // rows of a tile, which items are multiples of
  static constexpr int STEPS = 8;              // steps whose weights are added to the output together
  static constexpr int K_STEP = DK * 2 * TILE, V_STEP = DV * 2 * TILE, Q_TILE = DK * 2 * TILE, O_TILE = DV * 4 * TILE;  // bytes
  // Keys are packed all at once up to WHOLE of them (a megabyte, half of L2), longer ones in blocks that the tiles of up to
  // MAX_ROWS rows share.
  static constexpr int BLOCK_STEPS = max_of(STEPS, min_of(32, (512 << 10) / (K_STEP + V_STEP) / STEPS * STEPS));
  static constexpr int BLOCK = BLOCK_STEPS * STEP, WHOLE = 2 * BLOCK, WHOLE_STEPS = 2 * BLOCK_STEPS;
  static constexpr int MAX_ROWS = max_of(4, (1536 << 10) / (Q_TILE + O_TILE) / 4 * 4) * ROWS;
  static constexpr float UNSET = -3e38f, LIMIT = 0x1p60f;

  struct Sums {  // of the 32 rows of a tile
    vf m[2], l[2];  // reference points; sums of the rounded weights, by which the output is divided
    vf exact[2];    // sums of the weights, for the lse
    int64_t begun;  // the output holds something
  };
  struct Scratch {
    char s[2][4 * TILE];                // scores of this step and the next: [32 rows / 16][32 keys][16] float
    char p[2][STEPS * 2 * TILE];        // weights of these steps and the ones before: [step][32 rows / 16][16 key pairs][16][2]
    char nowhere[4 * TILE];             // for accumulators of no meaning
    float scale[Pack::BF16 ? 16 : WHOLE];  // of each key's scores, where keys are not bfloat16
    alignas(64) float rows[16][DV * 32];
    typename Pack::Scratch pack;
    alignas(64) char rest[64];  // a block of the item's keys, of its values, then queries, outputs and sums of its tiles
  };
  static constexpr int64_t tiles_of(int64_t rows) { return (rows + ROWS - 1) / ROWS; }
  static constexpr int64_t block_of(int64_t keys) { return keys > WHOLE ? BLOCK : WHOLE; }
  static constexpr int64_t steps_of(int64_t keys) { return (min_of(block_of(keys), keys) + STEP - 1) / STEP; }
  // With one block of keys a tile is done before the next but one begins, so two suffice and stay in L1.
  static constexpr int64_t held(int64_t rows, int64_t keys) {
    return keys > WHOLE ? tiles_of(rows) : min_of<int64_t>(2, tiles_of(rows));
  }
  static constexpr int64_t SUMS = 4;  // ... and as many of the sums
  // Rows of an item, so that tiles and a block of keys take no more than all the keys would.
  static int64_t most_rows(int64_t keys) {
    if (keys <= WHOLE) return MAX_ROWS;
    return min_of<int64_t>(MAX_ROWS, (keys - BLOCK) / STEP * (K_STEP + V_STEP) / (Q_TILE + O_TILE) * ROWS);
  }
  static int64_t scratch_size(int64_t rows, int64_t keys) {  // or of fewer rows or keys
    const int64_t size = sizeof(Scratch) + steps_of(keys) * (K_STEP + V_STEP) + held(rows, keys) * (Q_TILE + O_TILE) +
                         max_of(SUMS, held(rows, keys)) * (int64_t)sizeof(Sums);
    return keys > WHOLE ? max_of(size, scratch_size(rows, WHOLE)) : size;
  }
  struct List {  // steps of the block that a row tile needs
    int n;
    uint8_t step[WHOLE_STEPS], masked[WHOLE_STEPS];
  };
  // Rows of queries and outputs that are needed soon. They lie pages apart, where the processor's own prefetching does not
  // follow, so their lines are asked for while the matrix unit works: a few with every step.
  struct Ahead {
    int n = 0, at = 0;
    struct { const char* row; int64_t bytes; } rows[2 * ROWS];
    FL_INLINE void add(const void* base, int64_t at, int64_t size, int64_t count) {
      rows[n++] = {(const char*)base + at * size, count * size};
    }
    FL_INLINE void fetch(int to) {
      for (; at < to; at++)
        for (int64_t b = 0; b < rows[at].bytes; b += 64) prefetch(rows[at].row + b);
    }
  };
  struct Pending {  // weights that are still to be added to an output
    int steps;
    bool first;  // the output is new
    int tile;    // to be given out after that, or -1
    const char *p, *v[STEPS];
    char* o;
  };
  template <class L, class M> struct Bound { L logits[2]; M mask[2]; };
  template <class L, class M> static FL_INLINE Bound<L, M> bind(L l0, L l1, M m0, M m1) { return {{l0, l1}, {m0, m1}}; }

  const Args& a;
  const Params& p;
  Scratch& w;
  const Item& it;
  const int32_t block_keys;
  char *const keys, *const values, *const queries, *const outputs;
  Sums* const all_sums;
  Request r;
  int32_t kv_head = 0, kv0 = 0, tiles;
  float scale = 0, v_scale = 0;  // of scores (to log2 units where nothing comes between), of outputs
  float cap = 0;                 // of scores, in their units; then `scale` is relative to it
  bool single = false, first_block = false, last_block = false;
  const bool exactly;  // whether anybody asks for the lse
  Pending pending = {};
  char* done = nullptr;  // where the accumulators belong
  int s_at = 0, p_at = 0;

  AmxKernel(const Args& a, const Params& p, char* scratch, const Item& it)
      : a(a), p(p), w(*(Scratch*)scratch), it(it), block_keys(block_of(it.kv_hi - it.kv_lo)), keys(w.rest),
        values(keys + steps_of(it.kv_hi - it.kv_lo) * K_STEP),
        queries(values + steps_of(it.kv_hi - it.kv_lo) * V_STEP),
        outputs(queries + held(it.row_hi - it.row_lo, it.kv_hi - it.kv_lo) * Q_TILE),
        all_sums((Sums*)(outputs + held(it.row_hi - it.row_lo, it.kv_hi - it.kv_lo) * O_TILE)), r(a, it.request),
        tiles((int32_t)tiles_of(it.row_hi - it.row_lo)), exactly(a.lse || it.splits > 1 || V::uses_lse) {}

  FL_INLINE char* q_of(int tile) { return queries + (int64_t)(single ? tile & 1 : tile) * Q_TILE; }
  FL_INLINE char* o_of(int tile) { return outputs + (int64_t)(single ? tile & 1 : tile) * O_TILE; }
  FL_INLINE Sums& sums_of(int tile) const { return all_sums[single ? tile & (SUMS - 1) : tile]; }
  FL_INLINE int32_t row_of(int tile) const { return it.row_lo + tile * ROWS; }
  FL_INLINE int keep(int32_t lo, int32_t hi, int32_t from, int32_t to) const {
    return verdict<C, V>(r, p, kv_head, lo, hi, from, min_of(to, it.kv_hi));
  }

  FL_OUTLINE void queries_ahead(int tile, Ahead& x) const {
    for (int32_t i = row_of(tile), end = min_of(i + ROWS, it.row_hi); i < end; i++)
      x.add(a.q, r.batch * a.q_request + (r.q_start + i / G) * a.q_token + (kv_head * G + i % G) * a.q_head, 2, C::DIM);
  }
  FL_OUTLINE void outputs_ahead(int tile, Ahead& x) const {
    for (int32_t i = row_of(tile), end = min_of(i + ROWS, it.row_hi); i < end; i++)
      x.add(a.out, r.batch * a.out_request + (r.q_start + i / G) * a.out_token + (kv_head * G + i % G) * a.out_head,
            a.out_type == 0 ? 4 : 2, VALUE_DIM);
  }

  FL_OUTLINE RowsAt at(int32_t first) const {
    RowsAt x = {r.batch, kv_head, r.q_len, r.kv_len, r.q_start, r.kv_start, vi{}, vi{}};
    for (int i = 0; i < VL; i++) {
      int32_t row = min_of(first + i, it.row_hi - 1);
      x.q_head[i] = kv_head * G + row % G;
      x.q_pos[i] = r.kv_len - r.q_len + row / G;
    }
    return x;
  }

  FL_OUTLINE void list_steps(int tile, int steps, List& list) const {
    list.n = 0;
    int32_t lo = row_of(tile), hi = min_of(lo + ROWS, it.row_hi);
    int whole = keep(lo, hi, kv0, kv0 + steps * STEP);
    if (whole == 0) return;
    for (int j = (steps - 1) / STEPS * STEPS; j >= 0; j -= STEPS) {
      int end = min_of(j + STEPS, steps);
      int part = whole == 2 ? 2 : keep(lo, hi, kv0 + j * STEP, kv0 + end * STEP);
      for (int i = end - 1; part && i >= j; i--) {
        int one = part == 2 ? 2 : keep(lo, hi, kv0 + i * STEP, kv0 + (i + 1) * STEP);
        if (one == 0) continue;
        list.step[list.n] = i;
        list.masked[list.n++] = one == 1 || kv0 + (i + 1) * STEP > it.kv_hi;
      }
    }
  }

  // Products of two keys become the exponents of weights, in log2 units (softmax), or weights.
  template <bool MASKED, class B> FL_INLINE void logits(const B& bound, int half, vf& s0, vf& s1, int32_t kv_pos) const {
    s0 *= Pack::BF16 ? scale : w.scale[kv_pos - kv0];
    s1 *= Pack::BF16 ? scale : w.scale[kv_pos + 1 - kv0];
    if constexpr (V::capped) {
      tanh_pair(s0, s1);
      s0 *= cap, s1 *= cap;
    } else if constexpr (V::has_logits) {
      s0 = bound.logits[half](s0, kv_pos), s1 = bound.logits[half](s1, kv_pos + 1);
      if constexpr (V::softmax) s0 *= LOG2E, s1 *= LOG2E;
    }
    if constexpr (MASKED) {
      const vf none = bc(V::softmax ? -__builtin_inff() : 0.f);
      if constexpr (V::has_mask) s0 = where(bound.mask[half](kv_pos), s0, none);
      if constexpr (V::has_mask) s1 = where(bound.mask[half](kv_pos + 1), s1, none);
      if (kv_pos >= it.kv_hi) s0 = none;
      if (kv_pos + 1 >= it.kv_hi) s1 = none;
    }
  }

  // Unit u of a step becomes weights: two keys of 16 rows, keys 2 (u % 16) and the next.
  template <bool MASKED, class B>
  FL_INLINE void weigh(const B& bound, Sums& sums, const char* s, char* to, int32_t kv, int u) const {
    const int half = u >> 4;
    const int32_t key = kv + (u & 15) * 2;
    vf x[2] = {loadu((const float*)(s + u * 128)), loadu((const float*)(s + u * 128 + 64))};
    logits<MASKED>(bound, half, x[0], x[1], key);
    if constexpr (V::softmax) x[0] = tile_exp2(x[0] - sums.m[half]), x[1] = tile_exp2(x[1] - sums.m[half]);
    const v32h pair = pair_bf16(x[0], x[1]);
    if constexpr (V::softmax) {
      add_pairs(sums.l[half], pair);
      if (exactly) sums.exact[half] += x[0] + x[1];
    }
    *(v32h*)(to + u * 64) = pair;
  }

  // New reference points from the scores of a step. Sums, the output if it has begun, and `steps` steps of weights at each of
  // `p0` and `p1` are brought to them.
  template <class B>
  FL_OUTLINE void raise(const B& bound, Sums& sums, int32_t kv, char* o, char* p0, int steps0, char* p1, int steps1) const {
    const char* s = w.s[s_at];
#pragma GCC unroll 1
    for (int half = 0; half < 2; half++) {
      vf top = bc(-__builtin_inff()), old = sums.m[half];
      for (int i = 0; i < STEP; i += 2) {
        const float* at = (const float*)(s + half * 2 * TILE + i * 64);
        vf x0 = loadu(at), x1 = loadu(at + 16);
        logits<true>(bound, half, x0, x1, kv + i);
        top = fast_max(x1, fast_max(x0, top));
      }
      top = round_even(top + 0.5f);
      sums.m[half] = top > old ? top : old;
      const vf shrink = tile_scale(bc(1.f), old - sums.m[half]);
      sums.l[half] *= shrink, sums.exact[half] *= shrink;
      for (int i = 0; sums.begun && i < DV * 32; i++) {
        float* x = (float*)(o + (i >> 5) * 4 * TILE + half * 2 * TILE + (i & 31) * 64);
        storeu(x, loadu(x) * shrink);
      }
      for (int j = 0; j < steps0 + steps1; j++) {
        char* x = (j < steps0 ? p0 + j * 2 * TILE : p1 + (j - steps0) * 2 * TILE) + half * TILE;
        for (int i = 0; i < 16; i++, x += 64)
          *(v32h*)x = pair_bf16((vf)(*(vu*)x << 16) * shrink, (vf)(*(vu*)x & 0xffff0000u) * shrink);
      }
    }
  }

  // The matrix work that accompanies a step: blocks of products, in order.
  struct Product {
    const char *a, *b;
    char *done, *acc;  // where the accumulators go first (or null), and what they continue (or null: zero)
  };
  template <int I> static FL_INLINE void multiply(const Product& x) {
    tile_operands<I>(x.a, x.b);
    if (x.done) tile_restart<I>(x.done, x.acc);
    tile_product<I>();
  }
  static FL_INLINE void multiply(const Product& x) { multiply<0>(x), multiply<1>(x), multiply<2>(x), multiply<3>(x); }
  // Scores of one step.
  FL_INLINE Product* list_scores(Product* x, const char* k, const char* q, char* to) {
    for (int d = 0; d < DK; d++) *x++ = {k + d * 2 * TILE, q + d * 2 * TILE, d == 0 ? done : nullptr, nullptr};
    done = to;
    return x;
  }
  // The pending weights times dims [d0, d1) of their values, in 32s.
  FL_INLINE Product* list_values(Product* x, int d0, int d1) {
    for (int d = d0; d < d1; d++) {
      char* o = pending.o + d * 4 * TILE;
      for (int k = 0; k < pending.steps; k++)
        *x++ = {pending.v[k] + d * 2 * TILE, pending.p + k * 2 * TILE, k == 0 ? done : nullptr, pending.first ? nullptr : o};
      done = o;
    }
    return x;
  }

  // The weights of one step, amid n > 0 products.
  template <class B>
  FL_INLINE void step(const B& bound, Sums& sums, char* to, int32_t kv, const Product* x, int n) {
    const int units = (STEP + 4 * n - 1) / (4 * n);
    int u = 0;
    auto some = [&]() __attribute__((always_inline)) {
      for (const int end = min_of(u + units, STEP); u < end; u++) weigh<false>(bound, sums, w.s[s_at], to, kv, u);
    };
    for (const Product* end = x + n; x < end; x++) {
      multiply<0>(*x), some();
      multiply<1>(*x), some();
      multiply<2>(*x), some();
      multiply<3>(*x), some();
    }
  }
  // The same in less code, for what is masked or has no products.
  template <class B>
  FL_INLINE void masked_step(const B& bound, Sums& sums, char* to, int32_t kv, const Product* x, int n) {
    const int units = (STEP + 4 * n) / (4 * n + 1);
    for (int i = 0, u = 0; u < STEP || i < 4 * n; i++) {
      if (i < 4 * n) {
        switch (i & 3) {
          case 0: multiply<0>(x[i >> 2]); break;
          case 1: multiply<1>(x[i >> 2]); break;
          case 2: multiply<2>(x[i >> 2]); break;
          case 3: multiply<3>(x[i >> 2]);
        }
      }
      for (const int end = min_of(u + units, STEP); u < end; u++) weigh<true>(bound, sums, w.s[s_at], to, kv, u);
    }
  }
  FL_INLINE void flush() {
    tiles_store(done);
    done = w.nowhere;
  }

  // All steps of a row tile in this block. Its first scores are there already; it leaves those of the next tile.
  FL_OUTLINE void attend(int tile, const List& list, int next_tile, const List& next) {
    const RowsAt at0 = at(row_of(tile)), at1 = at(row_of(tile) + 16);
    const auto bound = bind(V::bind_logits(at0, p), V::bind_logits(at1, p), V::bind_mask(at0, p), V::bind_mask(at1, p));
    Sums& sums = sums_of(tile);
    char* o = o_of(tile);
    Ahead ahead;
    if (first_block) queries_ahead(tile + 2, ahead);
    if (last_block && it.splits == 1) outputs_ahead(tile, ahead);
    for (int from = 0; from < list.n; from += STEPS) {
      const int size = min_of(STEPS, list.n - from);
      char* weights = w.p[p_at];
      for (int j = 0; j < size; j++) {
        const int i = from + j;
        const int32_t kv = kv0 + list.step[i] * STEP;
        Product x[DK + DV * STEPS], *end = x;
        if (i + 1 < list.n) end = list_scores(x, keys + list.step[i + 1] * K_STEP, q_of(tile), w.s[s_at ^ 1]);
        else if (next.n) end = list_scores(x, keys + next.step[0] * K_STEP, q_of(next_tile), w.s[s_at ^ 1]);
        if (pending.steps) end = list_values(end, j * DV / size, (j + 1) * DV / size);
        int products = (int)(end - x);
        ahead.fetch(ahead.n * (i + 1) / list.n);
        if (V::softmax && i == 0 && !sums.begun) raise(bound, sums, kv, o, nullptr, 0, nullptr, 0);
        const Sums before = sums;
        char* to = weights + j * 2 * TILE;
        for (;; products = 0) {
          if (list.masked[i] || products == 0) masked_step(bound, sums, to, kv, x, products);
          else step(bound, sums, to, kv, x, products);
          if (done == w.s[s_at ^ 1]) flush();
          if (!V::softmax || !any((sums.l[0] > LIMIT) | (sums.l[1] > LIMIT))) break;
          flush();
          sums = before;
          raise(bound, sums, kv, o, weights, j, (char*)pending.p, pending.o == o ? pending.steps : 0);
        }
        s_at ^= 1;
      }
      settle();
      pending = {size, !sums.begun, -1, weights, {}, o};
      for (int j = 0; j < size; j++) pending.v[j] = values + list.step[from + j] * V_STEP;
      sums.begun = 1;
      p_at ^= 1;
    }
    if (last_block) pending.tile = tile;
  }

  void settle() {  // what was pending has been multiplied
    if (pending.tile >= 0) {
      flush();
      give(pending.tile);
    }
    pending.steps = 0, pending.tile = -1, pending.o = nullptr;
  }
  FL_OUTLINE void drain() {
    Product x[DV * STEPS], *end = pending.steps ? list_values(x, 0, DV) : x;
    for (const Product* y = x; y < end; y++) multiply(*y);
    flush();
    settle();
  }

  FL_OUTLINE void block(int steps) {
    List lists[2];
    bool primed = false;  // the scores of the tile's first step are there
    done = w.nowhere;
    prepare(0, steps, lists[0]);
    for (int tile = 0; tile < tiles; tile++) {
      const List& list = lists[tile & 1];
      List& next = lists[(tile & 1) ^ 1];
      next.n = 0;
      if (tile + 1 < tiles) prepare(tile + 1, steps, next);
      if (list.n) {
        if (!primed) {
          Product x[DK], *end = list_scores(x, keys + list.step[0] * K_STEP, q_of(tile), w.s[s_at]);
          for (const Product* y = x; y < end; y++) multiply(*y);
          flush();
        }
        attend(tile, list, tile + 1, next);
        primed = next.n > 0;
      } else {
        drain();
        if (last_block) give(tile);
        primed = false;
      }
    }
    drain();
  }
  FL_INLINE void prepare(int tile, int steps, List& list) {
    if (first_block) {
      sums_of(tile) = {{bc(UNSET), bc(UNSET)}, {}, {}, 0};
      packer().queries(row_of(tile), it.row_hi, q_of(tile));
    }
    list_steps(tile, steps, list);
  }
  FL_INLINE Pack packer() {
    return {a, p, r, kv_head, w.pack, a.k_scale && (V::has_key || (Pack::BF16 && a.k_scale_page)), a.v_scale && a.v_scale_page};
  }

  FL_OUTLINE void key_scale(int step) {
    float* to = w.scale + step * STEP;
    const int32_t t = kv0 + step * STEP;
    const bool own = a.k_scale && !V::has_key;
    if (own) key_scales(a, r, t, min_of(STEP, it.kv_hi - t), a.k_scale, a.k_scale_page, kv_head * a.k_scale_head, to);
    for (int i = 0; i < STEP; i++) to[i] = own && t + i < it.kv_hi ? to[i] * scale : scale;
  }

  // 16 rows of the output, 32 dims: to their places as bfloat16, or (null) as floats to scratch. Answers what cannot be
  // compared where a row holds a NaN.
  FL_OUTLINE vf turn(const char* from, vf factor, int d, int count, uint16_t* const* to) {
    vi x[32];
    vf odd{};
#pragma GCC unroll 1
    for (int i = 0; i < 32; i++) {
      const vf y = loadu((const float*)(from + i * 64)) * factor;
      x[i] = (vi)y;
      if constexpr (V::has_mask) odd += y * 0.f;  // an infinity too, which costs time alone
    }
    transpose16(x), transpose16(x + 16);
#pragma GCC unroll 1
    for (int i = 0; i < count; i++) {
      if (to) *(v32h_u*)(to[i] + d * 32) = join_bf16((vf)x[i], (vf)x[16 + i]);
      else storeu(w.rows[i] + d * 32, (vf)x[i]), storeu(w.rows[i] + d * 32 + 16, (vf)x[16 + i]);
    }
    return odd;
  }
  // 16 rows of a tile are done. Plain ones are divided, rounded and stored as vectors; the others go through Finish.
  FL_OUTLINE void give_half(const char* o, const Sums& sums, int half, int32_t first) {
    const bool plain = !V::has_output && VALUE_DIM % 32 == 0 && it.splits == 1 && a.out_type == 2 && r.kv_len > 0;
    const int32_t count = min_of(16, it.row_hi - first);
    const vf l = sums.l[half], m = l == 0.f ? bc(-__builtin_inff()) : sums.m[half], sum = exactly ? sums.exact[half] : l;
    vf factor = bc(v_scale);
    if (V::softmax) factor = l == 0.f ? vf{} : (plain ? factor : factor * sum) / l;
    uint16_t* to[16];
    const vf lse = V::softmax && plain && a.lse ? (m + log2(sum)) * LN2 : vf{};
#pragma GCC unroll 1
    for (int i = 0, token = first / G, head = first % G; plain && i < count; i++) {
      const int64_t row = r.q_start + token, q_head = kv_head * G + head;
      to[i] = (uint16_t*)a.out + r.batch * a.out_request + row * a.out_token + q_head * a.out_head;
      if (V::softmax && a.lse) a.lse[r.batch * a.lse_request + row * a.lse_token + q_head * a.lse_head] = lse[i];
      if (++head == G) head = 0, token++;
    }
    vf odd{};
    for (int d = 0; d < DV; d++) odd += turn(o + d * 4 * TILE + half * 2 * TILE, factor, d, count, plain ? to : nullptr);
    if constexpr (V::has_mask)
      if (plain && __builtin_expect(any(odd != odd), 0)) give_exactly(odd, first, count);
    for (int i = 0; !plain && i < count; i++) End::give(a, p, r, it, kv_head, first + i, w.rows[i], m[i], sum[i]);
  }
  FL_COLD void give_exactly(vf odd, int32_t first, int32_t count) {
    for (int i = 0; i < count; i++) {
      if (odd[i] == odd[i]) continue;
      for (int d = 0; d < DV * 32; d++) w.rows[i][d] = odd[i];
      End::row(a, p, r, kv_head, first + i, w.rows[i], odd[i], odd[i]);
    }
  }
  FL_OUTLINE void give(int tile) {
    const Sums& sums = sums_of(tile);
    if (!sums.begun) __builtin_memset(o_of(tile), 0, O_TILE);
    give_half(o_of(tile), sums, 0, row_of(tile));
    if (row_of(tile) + 16 < it.row_hi) give_half(o_of(tile), sums, 1, row_of(tile) + 16);
  }

  FL_OUTLINE void head() {
    // A head's one scale goes with the scores and the output; that of a page with each key's scores, or into the packed rows.
    scale = (float)a.sm_scale * (V::softmax && !V::has_logits ? LOG2E : 1.f);
    if constexpr (V::capped) scale *= V::cap_inside(p), cap = V::cap_outside(p) * (V::softmax ? LOG2E : 1.f);
    if (Pack::BF16 && a.k_scale && !V::has_key && !a.k_scale_page) scale *= a.k_scale[kv_head * a.k_scale_head];
    v_scale = a.v_scale && !a.v_scale_page ? a.v_scale[kv_head * a.v_scale_head] : 1.f;
    pending = {0, false, -1, nullptr, {}, nullptr};
    int32_t first = -1, last = -1;  // blocks that are needed, from the end
    for (int32_t kv = it.kv_lo; kv < it.kv_hi; kv += block_keys) {
      if (!keep(it.row_lo, it.row_hi, kv, kv + block_keys)) continue;
      if (last < 0) last = kv;
      first = kv;
    }
    single = first == last;
    if (first < 0) {
      for (int tile = 0; tile < tiles; tile++) {
        sums_of(tile) = {};
        give(tile);
      }
      return;
    }
    Ahead ahead;
    queries_ahead(0, ahead);
    if (tiles > 1) queries_ahead(1, ahead);
    ahead.fetch(ahead.n);
    Pack pack = packer();
    for (kv0 = first; kv0 >= last; kv0 -= block_keys) {
      if (!keep(it.row_lo, it.row_hi, kv0, kv0 + block_keys)) continue;
      first_block = kv0 == first, last_block = kv0 == last;
      const int steps = (min_of(block_keys, it.kv_hi - kv0) + STEP - 1) / STEP;
      for (int j = 0; j < steps; j += STEPS) {
        const int end = min_of(j + STEPS, steps);
        for (int i = keep(it.row_lo, it.row_hi, kv0 + j * STEP, kv0 + end * STEP) ? j : end; i < end; i++) {
          pack.keys(kv0 + i * STEP, it.kv_hi, keys + i * K_STEP);
          pack.values(kv0 + i * STEP, it.kv_hi, values + i * V_STEP);
          if (!Pack::BF16) key_scale(i);
        }
      }
      block(steps);
    }
  }

  void run() {
    TileScope scope;
    __builtin_memset(w.pack.zero, 0, sizeof w.pack.zero);
    for (kv_head = it.kv_head_lo; kv_head < it.kv_head_hi; kv_head++) head();
    End::item(a, p, r, it);
  }
};

}  // namespace flashloom
