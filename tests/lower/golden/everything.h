struct Variant {
  static constexpr bool has_query = true;
  static constexpr bool has_key = true;
  static constexpr bool has_logits = true;
  static constexpr bool has_mask = true;
  static constexpr bool has_output = true;
  static constexpr bool uses_lse = true;
  static constexpr bool softmax = true;
  static constexpr bool capped = false;
  struct Params {
    const void* data0;  // slopes, float32
    int64_t size0_0, stride0_0;
    const void* data1;  // gain, bfloat16
    int64_t size1_0, stride1_0;
    const void* data2;  // shift, int32
    int64_t size2_0, stride2_0;
    const void* data3;  // query_ids, int64
    int64_t size3_0, stride3_0;
    const void* data4;  // key_ids, int64
    int64_t size4_0, stride4_0;
    const void* data5;  // table, float32
    int64_t size5_0, size5_1, stride5_0, stride5_1;
    const void* data6;  // bits, uint8
    int64_t size6_0, stride6_0;
    float scalar7;  // scale
    explicit Params(const int64_t* words) {
      data0 = (const void*)words[0];
      size0_0 = words[1];
      stride0_0 = words[2];
      data1 = (const void*)words[3];
      size1_0 = words[4];
      stride1_0 = words[5];
      data2 = (const void*)words[6];
      size2_0 = words[7];
      stride2_0 = words[8];
      data3 = (const void*)words[9];
      size3_0 = words[10];
      stride3_0 = words[11];
      data4 = (const void*)words[12];
      size4_0 = words[13];
      stride4_0 = words[14];
      data5 = (const void*)words[15];
      size5_0 = words[16];
      size5_1 = words[17];
      stride5_0 = words[18];
      stride5_1 = words[19];
      data6 = (const void*)words[20];
      size6_0 = words[21];
      stride6_0 = words[22];
      scalar7 = float(word_as_double(words[23]));
      (void)words;
    }
  };
  template <class At> static FL_INLINE auto bind_logits(const At& at, const Params& p) {
    (void)at, (void)p;
    const auto t0 = load_entry<f32>(p.data0, at.q_head, p.size0_0, p.stride0_0);
    return [=](auto logits, auto kv_pos) __attribute__((always_inline)) {
      (void)logits; (void)kv_pos;
      const auto t1 = tanh(logits);
      const auto t2 = mod(kv_pos, 3);
      const auto t3 = load<f32>(p.data5, add(mul(to_int64(clamp_index(at.q_head, p.size5_0)), p.stride5_0), mul(to_int64(clamp_index(t2, p.size5_1)), p.stride5_1)));
      const auto t4 = mul(t3, t0);
      const auto t5 = add(t1, t4);
      return splat(t5);
    };
  }
  template <class At> static FL_INLINE auto bind_mask(const At& at, const Params& p) {
    (void)at, (void)p;
    const auto t0 = sub(at.kv_len, at.q_len);
    const auto t1 = sub(at.q_pos, t0);
    const auto t2 = add(at.q_start, t1);
    const auto t3 = load<i64>(p.data3, mul(to_int64(clamp_index(t2, p.size3_0)), p.stride3_0));
    const auto t4 = load_entry<i32>(p.data2, at.batch, p.size2_0, p.stride2_0);
    const auto t5 = to_int64(t4);
    return [=](auto kv_pos) __attribute__((always_inline)) {
      (void)kv_pos;
      const auto t6 = add(at.kv_start, kv_pos);
      const auto t7 = load<i64>(p.data4, mul(to_int64(clamp_index(t6, p.size4_0)), p.stride4_0));
      const auto t8 = eq(t3, t7);
      const auto t9 = to_int64(kv_pos);
      const auto t10 = add(t9, t5);
      const auto t11 = load_bit(p.data6, wrap_index(t10, p.size6_0 * 8));
      const auto t12 = or_(t8, t11);
      return t12;
    };
  }
  template <class At> static FL_INLINE void transform_query(const float* x, float* y, const At& at, const Params& p) {
    (void)at, (void)p, (void)x, (void)y;
    constexpr int32_t kRow = 64;
    (void)kRow;
    const auto t0 = load_entry<bf16>(p.data1, at.kv_head, p.size1_0, p.stride1_0);
    for (int32_t d = 0; d < kRow; d += VL) {
      const vi dim = add(iota(), d);
      (void)dim;
      const auto t1 = loadu(x + d);
      const auto t2 = mul(t1, t0);
      const auto t3 = bitxor_(dim, 1);
      const auto t4 = gather(x, clamp_index(t3, kRow));
      const auto t5 = add(t2, t4);
      storeu(y + d, splat(t5));
    }
  }
  template <class At> static FL_INLINE void transform_key(const float* x, float* y, const At& at, const Params& p) {
    (void)at, (void)p, (void)x, (void)y;
    constexpr int32_t kRow = 64;
    (void)kRow;
    for (int32_t d = 0; d < kRow; d += VL) {
      const vi dim = add(iota(), d);
      (void)dim;
      const auto t0 = lt(dim, 32);
      const auto t1 = gather(x, clamp_index(0, kRow));
      const auto t2 = loadu(x + d);
      const auto t3 = where(t0, t1, t2);
      const auto t4 = mul(t3, p.scalar7);
      storeu(y + d, splat(t4));
    }
  }
  template <class At> static FL_INLINE void transform_output(float* x, float lse, const At& at, const Params& p) {
    (void)at, (void)p, (void)x, (void)lse;
    constexpr int32_t kRow = 64;
    (void)kRow;
    const auto t0 = sigmoid(lse);
    for (int32_t d = 0; d < kRow; d += VL) {
      const vi dim = add(iota(), d);
      (void)dim;
      const auto t1 = mul(loadu(x + d), t0);
      storeu(x + d, splat(t1));
    }
  }
  // 0: no pair of the tile is kept, 2: all are, 1: look
  static inline int verdict(const Tile& t, const Params& p) {
    (void)t, (void)p;
    const auto t0 = sub(t.kv_len, t.q_len);
    const auto t1 = sub(t.q_pos_lo, t0);
    const auto t2 = max_(t1, 0);
    const auto t3 = add(t.q_start, t2);
    const auto t4 = sub(t.q_pos_hi, t0);
    const auto t5 = min_(t4, 1073741823);
    const auto t6 = add(t.q_start, t5);
    const auto t7 = block_max<i64>(p.data3, to_int64(t3), to_int64(t6), p.size3_0, p.stride3_0);
    const auto t8 = add(t.kv_start, t.kv_pos_lo);
    const auto t9 = add(t.kv_start, t.kv_pos_hi);
    const auto t10 = block_min<i64>(p.data4, to_int64(t8), to_int64(t9), p.size4_0, p.stride4_0);
    const auto t11 = lt(t7, t10);
    const auto t12 = block_min<i64>(p.data3, to_int64(t3), to_int64(t6), p.size3_0, p.stride3_0);
    const auto t13 = block_max<i64>(p.data4, to_int64(t8), to_int64(t9), p.size4_0, p.stride4_0);
    const auto t14 = gt(t12, t13);
    const auto t15 = or_(t11, t14);
    const auto t16 = not_(t15);
    const auto t17 = to_int64(t.kv_pos_lo);
    const auto t18 = load_entry<i32>(p.data2, t.batch, p.size2_0, p.stride2_0);
    const auto t19 = to_int64(t18);
    const auto t20 = add(t17, t19);
    const auto t21 = ge(t20, int64_t(0LL));
    const auto t22 = to_int64(t.kv_pos_hi);
    const auto t23 = add(t22, t19);
    const auto t24 = block_max_bit(p.data6, to_int64(t20), to_int64(t23), p.size6_0 * 8) != 0;
    const auto t25 = where(t21, t24, true);
    const auto t26 = or_(t16, t25);
    const auto t27 = eq(t12, t7);
    const auto t28 = eq(t10, t13);
    const auto t29 = and_(t27, t28);
    const auto t30 = eq(t12, t10);
    const auto t31 = and_(t29, t30);
    const auto t32 = block_min_bit(p.data6, to_int64(t20), to_int64(t23), p.size6_0 * 8) != 0;
    const auto t33 = where(t21, t32, false);
    const auto t34 = or_(t31, t33);
    return t34 ? 2 : t26 ? 1 : 0;
  }
};
