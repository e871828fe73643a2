// Reads memory and does nothing with it but XOR: the ceiling for whatever must read every key and value once.
#include <stdint.h>

#include "threads.h"

typedef uint64_t Words __attribute__((vector_size(64), aligned(8), may_alias));

static const int64_t CHUNK = 64 << 10;  // bytes per piece of work: 16 pages
static const int STREAMS = 8;           // read side by side, so that as many loads and prefetchers are under way
static const int64_t STEP = CHUNK / sizeof(Words) / STREAMS;

// Reads a multiple of 64 KiB and leaves out the rest. Answers a word that depends on all bytes.
extern "C" __attribute__((visibility("default"))) int64_t flashloom_read_bytes(const char* base, int64_t bytes, int64_t threads) {
  const int64_t chunks = bytes / CHUNK;
  uint64_t all = 0;
  flashloom::for_chunks(static_cast<int>(threads), chunks, [&](int, int64_t c) {
    const Words* p = reinterpret_cast<const Words*>(base + c * CHUNK);
    Words sum[STREAMS] = {};
    for (int64_t i = 0; i < STEP; ++i)
#pragma GCC unroll 8
      for (int s = 0; s < STREAMS; ++s) sum[s] ^= p[s * STEP + i];
    uint64_t word = 0;
    for (int s = 0; s < STREAMS; ++s)
      for (int i = 0; i < 8; ++i) word ^= sum[s][i];
    __atomic_fetch_xor(&all, word, __ATOMIC_RELAXED);
  });
  return static_cast<int64_t>(all);
}
