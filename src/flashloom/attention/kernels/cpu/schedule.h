// From the lengths of a batch to its items: which rows, heads and keys each piece of work takes. Pure numbers; run at plan and
// update.
//
// A request with few rows is cut over keys (its pieces are merged in their order, so results do not depend on who ran first);
// one with many rows over heads and rows, and over keys only if threads would be idle.
#pragma once
#include "args.h"

namespace flashloom {

struct Limits {
  int32_t decode_rows;       // requests with up to so many rows are decoded
  int32_t block_rows;        // rows of an item otherwise, at most
  int32_t step_rows;         // and a multiple of this
  int32_t decode_keys, key_block;  // keys of either are cut at multiples of these
  int64_t row_bytes;         // scratch per row of decode
  int64_t (*most_rows)(int64_t keys);                   // of an item of many rows
  int64_t (*scratch_rows)(int64_t rows, int64_t keys);  // scratch of one of up to so many
  int64_t scratch_decode;    // scratch of an item of decode, beside its rows
  int64_t partial;           // floats of a row's partial result
};

struct Scheduler {
  Args& a;
  const Limits& limit;
  int64_t items = 0, counters = 0, workspace = 0, decode_rows = 0;

  void add(int32_t b, int32_t head_lo, int32_t head_hi, int32_t row_lo, int32_t row_hi, int32_t kv_len, int32_t chunk) {
    int32_t splits = kv_len > chunk ? (kv_len + chunk - 1) / chunk : 1;
    int64_t size = (int64_t)(head_hi - head_lo) * (row_hi - row_lo) * limit.partial;
    for (int32_t s = 0; s < splits; s++, items++) {
      if (items >= a.item_capacity) continue;
      a.items[items] = {b, head_lo, head_hi, row_lo, row_hi, s * chunk, s + 1 == splits ? kv_len : (s + 1) * chunk,
                        s, splits, splits > 1 ? (int32_t)counters : -1, workspace};
    }
    if (splits > 1) counters++, workspace += size * splits;
  }

  static int32_t aligned(int64_t x, int32_t to) { return (int32_t)min_of<int64_t>(round_up(max_of<int64_t>(x, 1), to), 1 << 30); }

  FL_COLD void run(int32_t group) {
    const int64_t STATE = a.cut_state ? a.cut_state : 512 << 10;       // bytes of decode rows that should stay in the cache
    const int32_t SHORTEST = a.cut_shortest ? a.cut_shortest : 256;    // keys of a piece, at least
    constexpr int32_t INVARIANT = 2048;       // keys of a piece when results must not depend on the batch
    int64_t heads = a.kv_heads, pieces = a.threads * (a.cut_pieces ? a.cut_pieces : 4);
    int64_t decode_work = 0, row_work = 0, row_units = 0, rows_scratch = 0;  // keys x heads; blocks of rows
    for (int64_t b = 0; b < a.requests; b++) {
      int64_t rows = (int64_t)(a.q_indptr[b + 1] - a.q_indptr[b]) * group;
      if (rows == 0) continue;
      if (rows <= limit.decode_rows) decode_work += a.kv_lens[b] * heads;
      else row_work += rows * a.kv_lens[b] * heads, row_units += heads * ((rows + limit.block_rows - 1) / limit.block_rows);
    }
    // small work is not worth many pieces, and the least of it not a second thread, whose start takes microseconds
    const bool least = !row_work && decode_work <= 192 && !a.cut_pieces;
    if (least) a.threads = 1;
    int64_t decode_share = decode_work / (least ? 1 : decode_work < a.threads * 16384 && !a.cut_pieces ? a.threads * 2 : pieces);
    // many rows: blocks as large as leave every thread enough of them
    int64_t block = limit.block_rows;
    while (row_units && row_units < pieces && block > limit.step_rows) block /= 2, row_units *= 2;
    block = round_up(block, limit.step_rows);
    int64_t share = row_work / pieces;  // rows x keys
    for (int64_t b = 0; b < a.requests; b++) {
      int64_t rows = (int64_t)(a.q_indptr[b + 1] - a.q_indptr[b]) * group, kv = a.kv_lens[b];
      if (rows == 0) continue;
      if (rows <= limit.decode_rows) {
        int64_t most = max_of<int64_t>(1, STATE / (rows * limit.row_bytes)), some = min_of(heads, most);
        int64_t chunk = decode_share / some;  // keys, so that an item is one share of the work
        if (chunk < SHORTEST) {               // too little of each head: fewer heads instead
          chunk = min_of<int64_t>(SHORTEST, max_of<int64_t>(kv, 1));
          some = min_of(some, max_of<int64_t>(1, decode_share / chunk));
        }
        int32_t keys = aligned(max_of<int64_t>(chunk, SHORTEST), limit.decode_keys);
        if (a.batch_invariant) keys = INVARIANT;
        for (int64_t h = 0; h < heads; h += some) add(b, h, min_of(h + some, heads), 0, rows, kv, keys);
        decode_rows = max_of(decode_rows, rows * some);
        continue;
      }
      int64_t mine = min_of(min_of(block, limit.most_rows(kv)), round_up(rows, limit.step_rows));
      int64_t blocks = (rows + mine - 1) / mine;
      mine = round_up((rows + blocks - 1) / blocks, limit.step_rows);  // even blocks
      int32_t keys = 1 << 30;
      if (row_units < a.threads * 2) keys = aligned(max_of<int64_t>(share / mine, 4 * SHORTEST), limit.key_block);
      if (a.batch_invariant) keys = 1 << 30;
      rows_scratch = max_of(rows_scratch, limit.scratch_rows(min_of(mine, rows), min_of<int64_t>(keys, kv)));
      // the last rows first: under a causal mask they are the longest
      for (int64_t at = (rows - 1) / mine * mine; at >= 0; at -= mine)
        for (int64_t h = 0; h < heads; h++) add(b, h, h + 1, at, min_of(at + mine, rows), kv, keys);
    }
    a.item_count = items, a.counter_count = counters, a.workspace_size = workspace;
    a.scratch_size = round_up(max_of(rows_scratch, limit.scratch_decode + decode_rows * limit.row_bytes), 4096);
  }
};

}  // namespace flashloom
