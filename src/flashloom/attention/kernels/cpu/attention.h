// The entries of an attention kernel: schedule(args) and run(args), as plain C functions. The generated source
// includes this, defines `Config` and `Variant` in namespace flashloom, and says FL_ATTENTION. Two halves can be compiled at
// the same time: the entries with few rows (FL_PART 0), and many rows (FL_PART 1).
#pragma once
#include "decode.h"
#if defined(__AMX_BF16__)
#include "amx_prefill.h"
#endif
#include "rows.h"
#include "schedule.h"
#include "threads.h"

namespace flashloom {

// Which kernel takes many rows: AMX where the target has it and both sides are at most 16 bits wide, vectors otherwise.
#if defined(__AMX_BF16__)
template <class C, class V>
using ManyRows = typename choose<AmxKernel<C, V>::SERVES, AmxKernel<C, V>, RowsKernel<C, V>>::type;
#else
template <class C, class V> using ManyRows = RowsKernel<C, V>;
#endif

template <class C, class V> void many_rows(const Args& a, const typename V::Params& p, char* scratch, const Item& it)
#if defined(FL_PART) && FL_PART == 0
    ;
#else
{
  ManyRows<C, V>(a, p, scratch, it).run();
}
#endif

template <class C, class V> struct Kernels {
  typedef ManyRows<C, V> Rows;
  typedef DecodeKernel<C, V> Decode;
  static constexpr int DECODE_ROWS = VL >= 16 ? 12 : VL;

  static int32_t decode_rows(const Args& a) {
    return a.cut_decode_rows ? min_of<int64_t>(a.cut_decode_rows, DECODE_ROWS) : DECODE_ROWS;
  }
  static Limits limits(const Args& a) {
    int32_t block = a.cut_block_rows ? min_of<int64_t>(round_up(a.cut_block_rows, Rows::SUB), Rows::MAX_ROWS) : Rows::MAX_ROWS;
    return {decode_rows(a), block, Rows::SUB, Decode::BLOCK, Rows::BLOCK, (int64_t)sizeof(typename Decode::Row),
            Rows::most_rows, Rows::scratch_size, Decode::scratch_size(0), Finish<C, V>::PARTIAL};
  }
  static void schedule(Args& a) {
    Limits limit = limits(a);
    Scheduler{a, limit}.run(C::GROUP);
  }
  static void run(const Args& a) {
    const typename V::Params params(a.words);
    const int32_t few = decode_rows(a);
    for_chunks((int)a.threads, a.item_count, [&](int thread, int64_t i) {
      const Item& it = a.items[i];
      char* scratch = a.scratch + thread * a.scratch_size;
      if (it.row_hi - it.row_lo <= few && it.row_lo == 0) Decode(a, params, scratch, it).run();
      else many_rows<C, V>(a, params, scratch, it);
    });
  }
};

}  // namespace flashloom

#if defined(FL_PART) && FL_PART == 1
#define FL_ATTENTION                                                           \
  template void flashloom::many_rows<flashloom::Config, flashloom::Variant>(   \
      const flashloom::Args&, const flashloom::Variant::Params&, char*, const flashloom::Item&);
#else
#define FL_ENTRY extern "C" __attribute__((visibility("default"))) int64_t
#define FL_ATTENTION                                                                       \
  FL_ENTRY flashloom_schedule(flashloom::Args* args) {                                     \
    flashloom::Kernels<flashloom::Config, flashloom::Variant>::schedule(*args);            \
    return 0;                                                                              \
  }                                                                                        \
  FL_ENTRY flashloom_run(flashloom::Args* args) {                                          \
    flashloom::Kernels<flashloom::Config, flashloom::Variant>::run(*args);                 \
    return 0;                                                                              \
  }
#endif
