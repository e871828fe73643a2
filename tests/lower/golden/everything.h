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
    return [=](auto kv_pos) __attribute__((always_inline)) {
      (void)kv_pos;
      const auto t5 = add(at.kv_start, kv_pos);
      const auto t6 = load<i64>(p.data4, mul(to_int64(clamp_index(t5, p.size4_0)), p.stride4_0));
      const auto t7 = eq(t3, t6);
      const auto t8 = add(kv_pos, t4);
      const auto t9 = load_bit(p.data6, clamp_index(t8, p.size6_0 * 8));
      const auto t10 = or_(t7, t9);
      return t10;
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
    const auto t0 = to_int64(t.q_start);
    const auto t1 = sub(t.kv_len, t.q_len);
    const auto t2 = sub(t.q_pos_lo, t1);
    const auto t3 = to_int64(t2);
    const auto t4 = add(t0, t3);
    const auto t5 = ge(t4, int64_t(-2147483648LL));
    const auto t6 = sub(t.q_pos_hi, t1);
    const auto t7 = to_int64(t6);
    const auto t8 = add(t0, t7);
    const auto t9 = le(t8, int64_t(2147483647LL));
    const auto t10 = and_(t5, t9);
    const auto t11 = to_int32(t4);
    const auto t12 = where(t10, t11, (-2147483647 - 1));
    const auto t13 = to_int32(t8);
    const auto t14 = where(t10, t13, 2147483647);
    const auto t15 = block_max<i64>(p.data3, to_int64(t12), to_int64(t14), p.size3_0, p.stride3_0);
    const auto t16 = add(t.kv_start, t.kv_pos_lo);
    const auto t17 = add(t.kv_start, t.kv_pos_hi);
    const auto t18 = block_min<i64>(p.data4, to_int64(t16), to_int64(t17), p.size4_0, p.stride4_0);
    const auto t19 = lt(t15, t18);
    const auto t20 = block_min<i64>(p.data3, to_int64(t12), to_int64(t14), p.size3_0, p.stride3_0);
    const auto t21 = block_max<i64>(p.data4, to_int64(t16), to_int64(t17), p.size4_0, p.stride4_0);
    const auto t22 = gt(t20, t21);
    const auto t23 = or_(t19, t22);
    const auto t24 = not_(t23);
    const auto t25 = to_int64(t.kv_pos_lo);
    const auto t26 = load_entry<i32>(p.data2, t.batch, p.size2_0, p.stride2_0);
    const auto t27 = to_int64(t26);
    const auto t28 = add(t25, t27);
    const auto t29 = ge(t28, int64_t(-2147483648LL));
    const auto t30 = to_int64(t.kv_pos_hi);
    const auto t31 = add(t30, t27);
    const auto t32 = le(t31, int64_t(2147483647LL));
    const auto t33 = and_(t29, t32);
    const auto t34 = to_int32(t28);
    const auto t35 = where(t33, t34, (-2147483647 - 1));
    const auto t36 = to_int32(t31);
    const auto t37 = where(t33, t36, 2147483647);
    const auto t38 = block_max_bit(p.data6, to_int64(t35), to_int64(t37), p.size6_0 * 8) != 0;
    const auto t39 = or_(t24, t38);
    const auto t40 = eq(t20, t15);
    const auto t41 = eq(t18, t21);
    const auto t42 = and_(t40, t41);
    const auto t43 = eq(t20, t18);
    const auto t44 = and_(t42, t43);
    const auto t45 = block_min_bit(p.data6, to_int64(t35), to_int64(t37), p.size6_0 * 8) != 0;
    const auto t46 = or_(t44, t45);
    return t46 ? 2 : t39 ? 1 : 0;
  }
};
