struct Variant {
  static constexpr bool has_query = false;
  static constexpr bool has_key = false;
  static constexpr bool has_logits = true;
  static constexpr bool has_mask = true;
  static constexpr bool has_output = false;
  static constexpr bool uses_lse = false;
  static constexpr bool softmax = true;
  static constexpr bool capped = true;
  struct Params {
    int32_t scalar0;  // LeftWindow.left
    float scalar1;  // SoftCap.cap
    explicit Params(const int64_t* words) {
      scalar0 = int32_t(words[0]);
      scalar1 = float(word_as_double(words[1]));
      (void)words;
    }
  };
  template <class At> static FL_INLINE auto bind_logits(const At& at, const Params& p) {
    (void)at, (void)p;
    const auto t0 = div(1.0f, p.scalar1);
    return [=](auto logits, auto kv_pos) __attribute__((always_inline)) {
      (void)logits; (void)kv_pos;
      const auto t1 = mul(logits, t0);
      const auto t2 = tanh(t1);
      const auto t3 = mul(p.scalar1, t2);
      return splat(t3);
    };
  }
  static FL_INLINE float cap_outside(const Params& p) {
    (void)p;
    return p.scalar1;
  }
  static FL_INLINE float cap_inside(const Params& p) {
    (void)p;
    const auto t0 = div(1.0f, p.scalar1);
    return t0;
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
