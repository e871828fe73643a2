struct Variant {
  static constexpr bool has_query = false;
  static constexpr bool has_key = false;
  static constexpr bool has_logits = true;
  static constexpr bool has_mask = true;
  static constexpr bool has_output = false;
  static constexpr bool uses_lse = false;
  static constexpr bool softmax = false;
  static constexpr bool capped = false;
  struct Params {
    float scalar0;  // Sigmoid.bias
    explicit Params(const int64_t* words) {
      scalar0 = float(word_as_double(words[0]));
      (void)words;
    }
  };
  template <class At> static FL_INLINE auto bind_logits(const At& at, const Params& p) {
    (void)at, (void)p;
    return [=](auto logits, auto kv_pos) __attribute__((always_inline)) {
      (void)logits; (void)kv_pos;
      const auto t0 = add(logits, p.scalar0);
      const auto t1 = sigmoid(t0);
      return splat(t1);
    };
  }
  template <class At> static FL_INLINE auto bind_mask(const At& at, const Params& p) {
    (void)at, (void)p;
    return [=](auto kv_pos) __attribute__((always_inline)) {
      (void)kv_pos;
      const auto t0 = le(kv_pos, at.q_pos);
      return t0;
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
    const auto t2 = le(t.kv_pos_hi, t.q_pos_lo);
    return t2 ? 2 : t1 ? 1 : 0;
  }
};
