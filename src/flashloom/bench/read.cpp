// Reads memory and does nothing with it but XOR: the ceiling for whatever must read every key and value once.
#include <stdint.h>
#include <tvm/ffi/c_api.h>

typedef uint64_t Words __attribute__((vector_size(64), aligned(8), may_alias));

static const int64_t CHUNK = 64 << 10;  // bytes per piece of work: 16 pages

// args: address, bytes (a multiple of 64 KiB is read, the rest left out), threads. Result: a word that depends on all bytes.
extern "C" int __tvm_ffi_read_bytes(void*, const TVMFFIAny* args, int32_t, TVMFFIAny* result) {
  const char* const base = reinterpret_cast<const char*>(args[0].v_int64);
  const int64_t chunks = args[1].v_int64 / CHUNK;
  uint64_t all = 0;
#pragma omp parallel for schedule(static) num_threads(args[2].v_int64) reduction(^ : all)
  for (int64_t c = 0; c < chunks; ++c) {
    const Words* p = reinterpret_cast<const Words*>(base + c * CHUNK);
    Words a = {}, b = {}, x = {}, y = {};
    for (int64_t i = 0; i < CHUNK / 64; i += 4) {  // four chains hide the latency
      __builtin_prefetch(p + i + 64);
      a ^= p[i], b ^= p[i + 1], x ^= p[i + 2], y ^= p[i + 3];
    }
    a ^= b ^ x ^ y;
    for (int i = 0; i < 8; ++i) all ^= a[i];
  }
  result->type_index = kTVMFFIInt;
  result->zero_padding = 0;
  result->v_int64 = static_cast<int64_t>(all);
  return 0;
}
