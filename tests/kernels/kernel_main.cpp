// A program around one generated kernel (named by KERNEL), so that it can run under an emulator: reads a file of int64 sizes
// followed by the arrays of one paged batch, writes out and lse.
#include <stdio.h>
#include <stdlib.h>

#include KERNEL

// torch's OpenMP runtime is not there: one thread
extern "C" void GOMP_parallel(void (*body)(void*), void* data, unsigned, unsigned) { body(data); }
extern "C" int omp_get_thread_num() { return 0; }
extern "C" int omp_get_num_threads() { return 1; }

static void* zeroed(int64_t bytes) { return calloc(bytes + 64, 1); }
static char* aligned(int64_t bytes) { return (char*)(((uintptr_t)zeroed(bytes + 4096) + 4095) / 4096 * 4096); }

int main(int, char** argv) {
  FILE* in = fopen(argv[1], "rb");
  enum { TOKENS, Q_HEADS, KV_HEADS, DIM, VALUE_DIM, REQUESTS, ENTRIES, PAGES, PAGE, Q_BYTES, KV_BYTES, WORDS, SIZES };
  int64_t n[SIZES];
  if (!in || fread(n, 8, SIZES, in) != SIZES) return 1;
  auto read = [&](int64_t bytes) {
    void* p = zeroed(bytes);
    if ((int64_t)fread(p, 1, bytes, in) != bytes) exit(2);
    return p;
  };
  flashloom::Args a = {};
  a.words = (int64_t*)read(n[WORDS] * 8);
  a.q_indptr = (int32_t*)read((n[REQUESTS] + 1) * 4), a.kv_indptr = (int32_t*)read((n[REQUESTS] + 1) * 4);
  a.kv_lens = (int32_t*)read(n[REQUESTS] * 4), a.page_indptr = (int32_t*)read((n[REQUESTS] + 1) * 4);
  a.pages = (int32_t*)read(n[ENTRIES] * 4);
  a.q = read(n[TOKENS] * n[Q_HEADS] * n[DIM] * n[Q_BYTES]);
  int64_t rows = n[PAGES] * n[PAGE] * n[KV_HEADS];
  a.k = read(rows * n[DIM] * n[KV_BYTES]), a.v = read(rows * n[VALUE_DIM] * n[KV_BYTES]);
  a.q_head = n[DIM], a.q_token = n[DIM] * n[Q_HEADS];
  a.out_head = n[VALUE_DIM], a.out_token = n[VALUE_DIM] * n[Q_HEADS], a.lse_head = 1, a.lse_token = n[Q_HEADS];
  a.k_head = n[DIM], a.k_token = a.k_head * n[KV_HEADS], a.k_page = a.k_token * n[PAGE];
  a.v_head = n[VALUE_DIM], a.v_token = a.v_head * n[KV_HEADS], a.v_page = a.v_token * n[PAGE];
  a.sm_scale = 0.125, a.page_size = n[PAGE], a.requests = n[REQUESTS], a.kv_heads = n[KV_HEADS], a.threads = 1;
  int64_t out = n[TOKENS] * n[Q_HEADS] * n[VALUE_DIM], lse = n[TOKENS] * n[Q_HEADS];
  a.out = zeroed(out * 4), a.lse = (float*)zeroed(lse * 4);
  flashloom_schedule(&a);
  a.item_capacity = a.item_count, a.items = (flashloom::Item*)zeroed(a.item_count * sizeof(flashloom::Item));
  flashloom_schedule(&a);
  a.workspace = (float*)aligned(a.workspace_size * 4), a.counters = (int32_t*)zeroed(a.counter_count * 4);
  a.scratch = aligned(a.scratch_size);
  flashloom_run(&a);
  FILE* to = fopen(argv[2], "wb");
  fwrite(a.out, 4, out, to), fwrite(a.lse, 4, lse, to);
  return fclose(to);
}
