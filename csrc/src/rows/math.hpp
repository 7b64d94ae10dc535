// exp and log as plain arithmetic, so that loops over them become vector code without a library.
// Both are within 2 units in the last place of float; NaN stays NaN. Included by compute.cpp alone,
// inside its namespace: code for one instruction set must not be merged with code for another.

// exp(x) for x <= 0 (and a little above); 0 where the result would be subnormal.
inline float exp_nonpositive(float x) {
  const float shifted = x * 1.44269504F + 12582912.0F;  // 1.5 * 2^23: rounds to an integer
  const float n = shifted - 12582912.0F;
  // ln 2 in two parts, of which the first times n is exact.
  const float r = (x - n * 0.693359375F) + n * 2.12194440e-4F;
  // Minimax on [-ln 2 / 2, ln 2 / 2]; coefficients from Cephes' expf (Moshier).
  float y = 1.9875691500e-4F;
  y = y * r + 1.3981999507e-3F;
  y = y * r + 8.3334519073e-3F;
  y = y * r + 4.1665795894e-2F;
  y = y * r + 1.6666665459e-1F;
  y = y * r + 5.0000001201e-1F;
  y = y * r * r + r + 1.0F;
  const std::uint32_t exponent = (__builtin_bit_cast(std::uint32_t, shifted) - 0x4B400000U) << 23;
  const float scaled = __builtin_bit_cast(float, __builtin_bit_cast(std::uint32_t, y) + exponent);
  return x < -87.0F ? 0.0F : x == x ? scaled : x;
}

// log(x) for normal x > 0.
inline float log_positive(float x) {
  // x = m 2^e with m in [sqrt(1/2), sqrt(2)).
  const std::int32_t bits = __builtin_bit_cast(std::int32_t, x) - 0x3F3504F3;
  const float e = static_cast<float>(bits >> 23);
  const float m = __builtin_bit_cast(float, (bits & 0x007FFFFF) + 0x3F3504F3);
  const float r = m - 1.0F;
  const float square = r * r;
  // Minimax of log(1 + r); coefficients from Cephes' logf (Moshier).
  float y = 7.0376836292e-2F;
  y = y * r - 1.1514610310e-1F;
  y = y * r + 1.1676998740e-1F;
  y = y * r - 1.2420140846e-1F;
  y = y * r + 1.4249322787e-1F;
  y = y * r - 1.6668057665e-1F;
  y = y * r + 2.0000714765e-1F;
  y = y * r - 2.4999993993e-1F;
  y = y * r + 3.3333331174e-1F;
  y = y * r * square - e * 2.12194440e-4F - 0.5F * square;
  const float found = r + y + e * 0.693359375F;
  return x == x ? found : x;
}
