// Parallel regions on the OpenMP runtime that torch has loaded, without -fopenmp, alike for g++ and clang++.
//
//   parallel(threads, [&](int thread, int threads) { ... });   // every thread of the team runs the body; returns when all are done
//   for_chunks(threads, chunks, [&](int thread, int64_t chunk) { ... });   // chunks are handed out as threads become free
//
// GOMP_parallel is the entry that g++ itself emits calls of. It stays undefined in the library and is bound, when the kernel is
// loaded, to the runtime that torch uses (kernel/load.py), so that the process has one pool of threads.
#pragma once
#include <stdint.h>

extern "C" void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags);
extern "C" int omp_get_thread_num(void);
extern "C" int omp_get_num_threads(void);

namespace flashloom {

template <class Body>
inline void parallel(int threads, const Body& body) {
  if (threads <= 1) {
    body(0, 1);
    return;
  }
  GOMP_parallel([](void* data) { (*static_cast<const Body*>(data))(omp_get_thread_num(), omp_get_num_threads()); },
                const_cast<Body*>(&body), static_cast<unsigned>(threads), 0);
}

template <class Body>
inline void for_chunks(int threads, int64_t chunks, const Body& body) {
  if (threads > chunks) threads = static_cast<int>(chunks);
  alignas(64) int64_t next = 0;
  parallel(threads, [&](int thread, int) {
    for (int64_t chunk; (chunk = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < chunks;) body(thread, chunk);
  });
}

}  // namespace flashloom
