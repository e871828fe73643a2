struct Variant {
  static constexpr bool has_query = false;
  static constexpr bool has_key = false;
  static constexpr bool has_logits = false;
  static constexpr bool has_mask = true;
  static constexpr bool has_output = true;
  static constexpr bool uses_lse = true;
  static constexpr bool softmax = true;
  static constexpr bool capped = false;
  struct Params {
    int32_t scalar0;  // LeftWindow.left
    const void* data1;  // Sink.sinks, float32
    int64_t size1_0, stride1_0;
    explicit Params(const int64_t* words) {
      scalar0 = int32_t(words[0]);
      data1 = (const void*)words[1];
      size1_0 = words[2];
      stride1_0 = words[3];
      (void)words;
    }
  };
  template <class At> static FL_INLINE auto bind_logits(const At& at, const Params& p) {
    (void)at, (void)p;
    return [=](auto logits, auto kv_pos) __attribute__((always_inline)) { (void)logits; (void)kv_pos; return splat(logits); };
  }
  template <class At> static FL_INLINE auto bind_mask(const At& at, const Params& p) {
    (void)at, (void)p;
    const auto t0 = sub(at.q_pos, p.scalar0);
    return [=](auto kv_pos) __attribute__((always_inline)) {
      (void)kv_pos;
      const auto t1 = le(kv_pos, at.q_pos);
      const auto t2 = ge(kv_pos, t0);
      const auto t3 = and_(t1, t2);
      return t3;
    };
  }
  template <class At> static FL_INLINE void transform_query(const float* x, float* y, const At& at, const Params& p) {
    (void)at, (void)p, (void)x, (void)y;
  }
  template <class At> static FL_INLINE void transform_key(const float* x, float* y, const At& at, const Params& p) {
    (void)at, (void)p, (void)x, (void)y;
  }
  template <class At> static FL_INLINE void transform_output(float* x, float lse, const At& at, const Params& p) {
    (void)at, (void)p, (void)x, (void)lse;
    constexpr int32_t kRow = 64;
    (void)kRow;
    const auto t0 = load_entry<f32>(p.data1, at.q_head, p.size1_0, p.stride1_0);
    const auto t1 = sub(lse, t0);
    const auto t2 = sigmoid(t1);
    for (int32_t d = 0; d < kRow; d += VL) {
      const vi dim = add(iota(), d);
      (void)dim;
      const auto t3 = mul(loadu(x + d), t2);
      storeu(x + d, splat(t3));
    }
  }
  // 0: no pair of the tile is kept, 2: all are, 1: look
  static inline int verdict(const Tile& t, const Params& p) {
    (void)t, (void)p;
    const auto t0 = gt(t.kv_pos_lo, t.q_pos_hi);
    const auto t1 = not_(t0);
    const auto t2 = sub(t.q_pos_lo, p.scalar0);
    const auto t3 = gt(t2, t.kv_pos_hi);
    const auto t4 = not_(t3);
    const auto t5 = and_(t1, t4);
    const auto t6 = le(t.kv_pos_hi, t.q_pos_lo);
    const auto t7 = sub(t.q_pos_hi, p.scalar0);
    const auto t8 = le(t7, t.kv_pos_lo);
    const auto t9 = and_(t6, t8);
    return t9 ? 2 : t5 ? 1 : 0;
  }
};
