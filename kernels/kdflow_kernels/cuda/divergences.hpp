// Terms of the divergences that are sums over the vocabulary: f(log p, log q) and df/dlog q, as `Divergence.terms` of
// kernels/kdflow_kernels/divergences.py. p is the teacher, q the student.
//
// Included by csrc/src/rows/compute.cpp for CPUs and by cluster_rows.cu for GPUs, inside their namespaces. They define
// KDFLOW_INLINE; log_positive(x), the logarithm to a base of their choice, for normal x > 0; kLogE, what it is of e;
// and kTiny, the smallest normal float. at() takes logarithms to that base and returns f times kScaleF and df/dlog q
// times kScaleG, which are kLogE where a term is a multiple of logarithms.

struct Term {
  float f, g;
};

KDFLOW_INLINE float log_mixture(float share, float a, float b) {
  const float m = share * a + (1.0F - share) * b;
  return log_positive(m < kTiny ? kTiny : m);
}

// weight a / (weight a + other_weight b), 0 where both vanish.
KDFLOW_INLINE float share_of(float weight, float a, float other_weight, float b) {
  const float part = weight * a;
  const float whole = part + other_weight * b;
  return part / (whole < kTiny ? kTiny : whole);
}

struct ForwardKL {
  // The sum of p is 1, so that of g is known before a pass over the row.
  static constexpr bool kSumKnown = true;
  static constexpr float kScaleF = kLogE, kScaleG = 1.0F;
  KDFLOW_INLINE static Term at(float, float p, float, float log_p, float log_q) { return {p * (log_p - log_q), -p}; }
};

struct ReverseKL {
  static constexpr bool kSumKnown = false;
  static constexpr float kScaleF = kLogE, kScaleG = kLogE;
  KDFLOW_INLINE static Term at(float, float, float q, float log_p, float log_q) {
    const float f = q * (log_q - log_p);
    return {f, f + kLogE * q};
  }
};

struct JSD {
  static constexpr bool kSumKnown = false;
  static constexpr float kScaleF = kLogE, kScaleG = kLogE;
  KDFLOW_INLINE static Term at(float beta, float p, float q, float log_p, float log_q) {
    const float log_m = log_mixture(beta, p, q);
    const float g = (1.0F - beta) * q * (log_q - log_m);
    return {beta * p * (log_p - log_m) + g, g};
  }
};

struct SkewedForwardKL {
  static constexpr bool kSumKnown = false;
  static constexpr float kScaleF = kLogE, kScaleG = 1.0F;
  KDFLOW_INLINE static Term at(float alpha, float p, float q, float log_p, float) {
    return {p * (log_p - log_mixture(alpha, p, q)), -p * share_of(1.0F - alpha, q, alpha, p)};
  }
};

struct SkewedReverseKL {
  static constexpr bool kSumKnown = false;
  static constexpr float kScaleF = kLogE, kScaleG = kLogE;
  KDFLOW_INLINE static Term at(float alpha, float p, float q, float, float log_q) {
    const float f = q * (log_q - log_mixture(alpha, q, p));
    return {f, f + kLogE * q * share_of(1.0F - alpha, p, alpha, q)};
  }
};

struct TVD {
  static constexpr bool kSumKnown = false;
  static constexpr float kScaleF = 1.0F, kScaleG = 1.0F;
  KDFLOW_INLINE static Term at(float, float p, float q, float, float) {
    const float difference = q - p;
    const float half_sign = difference > 0.0F ? 0.5F : difference < 0.0F ? -0.5F : 0.0F * difference;
    return {half_sign * difference, half_sign * q};
  }
};

struct Jeffreys {
  static constexpr bool kSumKnown = false;
  static constexpr float kScaleF = kLogE, kScaleG = kLogE;
  KDFLOW_INLINE static Term at(float, float p, float q, float log_p, float log_q) {
    const float p_minus_q = p - q;
    const float log_ratio = log_p - log_q;
    return {p_minus_q * log_ratio, -(q * log_ratio + kLogE * p_minus_q)};
  }
};
