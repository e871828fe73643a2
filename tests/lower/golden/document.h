struct Variant {
  static constexpr bool has_query = false;
  static constexpr bool has_key = false;
  static constexpr bool has_logits = false;
  static constexpr bool has_mask = true;
  static constexpr bool has_output = false;
  static constexpr bool uses_lse = false;
  static constexpr bool softmax = true;
  static constexpr bool capped = false;
  struct Params {
    const void* data0;  // DocumentMask.documents, int32
    int64_t size0_0, stride0_0;
    explicit Params(const int64_t* words) {
      data0 = (const void*)words[0];
      size0_0 = words[1];
      stride0_0 = words[2];
      (void)words;
    }
  };
  template <class At> static FL_INLINE auto bind_logits(const At& at, const Params& p) {
    (void)at, (void)p;
    return [=](auto logits, auto kv_pos) __attribute__((always_inline)) { (void)logits; (void)kv_pos; return splat(logits); };
  }
  template <class At> static FL_INLINE auto bind_mask(const At& at, const Params& p) {
    (void)at, (void)p;
    const auto t0 = sub(at.kv_len, 1);
    const auto t1 = min_(at.q_pos, t0);
    const auto t2 = max_(t1, 0);
    const auto t3 = add(at.kv_start, t2);
    const auto t4 = load<i32>(p.data0, mul(to_int64(clamp_index(t3, p.size0_0)), p.stride0_0));
    return [=](auto kv_pos) __attribute__((always_inline)) {
      (void)kv_pos;
      const auto t5 = le(kv_pos, at.q_pos);
      const auto t6 = add(at.kv_start, kv_pos);
      const auto t7 = load<i32>(p.data0, mul(to_int64(clamp_index(t6, p.size0_0)), p.stride0_0));
      const auto t8 = eq(t7, t4);
      const auto t9 = and_(t5, t8);
      return t9;
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
    const auto t2 = add(t.kv_start, t.kv_pos_lo);
    const auto t3 = add(t.kv_start, t.kv_pos_hi);
    const auto t4 = block_max<i32>(p.data0, to_int64(t2), to_int64(t3), p.size0_0, p.stride0_0);
    const auto t5 = sub(t.kv_len, 1);
    const auto t6 = min_(t.q_pos_lo, t5);
    const auto t7 = max_(t6, 0);
    const auto t8 = add(t.kv_start, t7);
    const auto t9 = min_(t.q_pos_hi, t5);
    const auto t10 = max_(t9, 0);
    const auto t11 = add(t.kv_start, t10);
    const auto t12 = block_min<i32>(p.data0, to_int64(t8), to_int64(t11), p.size0_0, p.stride0_0);
    const auto t13 = lt(t4, t12);
    const auto t14 = block_min<i32>(p.data0, to_int64(t2), to_int64(t3), p.size0_0, p.stride0_0);
    const auto t15 = block_max<i32>(p.data0, to_int64(t8), to_int64(t11), p.size0_0, p.stride0_0);
    const auto t16 = gt(t14, t15);
    const auto t17 = or_(t13, t16);
    const auto t18 = not_(t17);
    const auto t19 = and_(t1, t18);
    const auto t20 = le(t.kv_pos_hi, t.q_pos_lo);
    const auto t21 = eq(t14, t4);
    const auto t22 = eq(t12, t15);
    const auto t23 = and_(t21, t22);
    const auto t24 = eq(t14, t12);
    const auto t25 = and_(t23, t24);
    const auto t26 = and_(t20, t25);
    return t26 ? 2 : t19 ? 1 : 0;
  }
};
