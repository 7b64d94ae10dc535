// Rows through the row step on one thread, a tile at a time: a tile's logits are widened into a
// buffer in the first-level cache, and every loop over that buffer is plain arithmetic, which the
// compiler turns into vector code for the instruction set this file is compiled for. As in the
// Triton row kernel a row takes
//
//   1. a pass for the statistics of both softmaxes,
//   2. where the sum of df/dlog q is not known beforehand, one for it and for the loss,
//   3. one that writes dloss/dlogits over the student's logits.
//
// KDFLOW_ISA is the namespace. Nothing here calls an inline function of a header, for the linker
// keeps one copy of such a function and it might be that of another instruction set.

#include <cfloat>
#include <cmath>

#include "rows.hpp"

namespace kdflow::rows::KDFLOW_ISA {
namespace {

constexpr float kLowest = -1e30F;  // problem.LOWEST_LOGIT
constexpr float kTiny = FLT_MIN;
constexpr float kLogE = 1.0F;  // logarithms are natural

// clang-format off: in this order
#include "math.hpp"
#define KDFLOW_INLINE inline
#include "divergences.hpp"
// clang-format on

inline float widen(std::uint16_t bfloat16) {
  return __builtin_bit_cast(float, static_cast<std::uint32_t>(bfloat16) << 16);
}
inline std::uint16_t narrow(float value) {  // to nearest even
  const auto bits = __builtin_bit_cast(std::uint32_t, value);
  const std::uint32_t rounded = (bits + 0x7FFFU + ((bits >> 16) & 1U)) >> 16;
  return static_cast<std::uint16_t>(value == value ? rounded : 0x7FC0U);
}

struct alignas(64) Buffer {
  float at[kMaxTileColumns];
};

// One row of one side.
struct Row {
  const Logits& logits;
  std::int64_t row;

  int width(std::int64_t tile) const { return static_cast<int>(logits.tiles[tile].width); }

  void load(std::int64_t tile, Buffer& z) const {
    const auto* maxima = reinterpret_cast<const float*>(logits.tiles[tile].maxima);
    const float maximum = maxima == nullptr ? 0.0F : maxima[row];
    const int n = width(tile);
    if (logits.bfloat16) {
      const auto* from = place<std::uint16_t>(tile);
#pragma omp simd
      for (int j = 0; j < n; ++j) z.at[j] = widen(from[j]) + maximum;
    } else {
      const auto* from = place<float>(tile);
#pragma omp simd
      for (int j = 0; j < n; ++j) z.at[j] = from[j] + maximum;
    }
  }

  void store(std::int64_t tile, const Buffer& dz) const {
    const int n = width(tile);
    if (logits.bfloat16) {
      auto* to = place<std::uint16_t>(tile);
#pragma omp simd
      for (int j = 0; j < n; ++j) to[j] = narrow(dz.at[j]);
    } else {
      auto* to = place<float>(tile);
#pragma omp simd
      for (int j = 0; j < n; ++j) to[j] = dz.at[j];
    }
  }

 private:
  template <class T>
  T* place(std::int64_t tile) const {
    const Tile& found = logits.tiles[tile];
    return reinterpret_cast<T*>(found.address) + row * found.row_stride;
  }
};

// Statistics of a softmax of z * factor, taken in tile by tile.
struct Softmax {
  float factor;
  float top = kLowest;
  std::int64_t best = 0;  // column of the first maximum
  double total = 0.0;     // sum of exp(d), d = z * factor - top
  double moment = 0.0;    // sum of exp(d) d

  void take_in(const Buffer& z, int n, std::int64_t first_column) {
    float highest = kLowest;
#pragma omp simd reduction(max : highest)
    for (int j = 0; j < n; ++j) {
      const float x = z.at[j] * factor;
      highest = x > highest ? x : highest;
    }
    if (highest > top) {
      int j = 0;
      while (z.at[j] * factor != highest) ++j;
      best = first_column + j;
      const double shift = static_cast<double>(top) - highest;
      const double decay = exp(shift);
      moment = total == 0.0 ? 0.0 : decay * (moment + total * shift);
      total *= decay;
      top = highest;
    }
    const float shift = top;
    float sum = 0.0F, weighted = 0.0F;
#pragma omp simd reduction(+ : sum, weighted)
    for (int j = 0; j < n; ++j) {
      const float d = z.at[j] * factor - shift;
      const float e = exp_nonpositive(d);
      sum += e;
      weighted += e * d;
    }
    total += sum;
    moment += weighted;
  }

  float log_total() const { return static_cast<float>(log(total)); }
  float entropy() const { return static_cast<float>(log(total) - moment / total); }
};

// What the passes after the first need of one softmax: log probability = z * factor - top - log_total.
struct LogProbs {
  float factor, top, log_total;
  explicit LogProbs(const Softmax& found) : factor(found.factor), top(found.top), log_total(found.log_total()) {}
  float at(float z) const { return (z * factor - top) - log_total; }
};

struct Sums {
  double f = 0.0, g = 0.0;
};

// Step 2 over the first n columns of a tile.
template <class D>
void add_terms(const Buffer& z, const Buffer& y, int n, LogProbs student, LogProbs teacher, float parameter,
               Sums& sums) {
  float f_sum = 0.0F, g_sum = 0.0F;
#pragma omp simd reduction(+ : f_sum, g_sum)
  for (int j = 0; j < n; ++j) {
    const float log_q = student.at(z.at[j]), log_p = teacher.at(y.at[j]);
    const Term term = D::at(parameter, exp_nonpositive(log_p), exp_nonpositive(log_q), log_p, log_q);
    f_sum += term.f;
    g_sum += term.g;
  }
  sums.f += f_sum;
  sums.g += g_sum;
}

// Step 3's divergence over the first n columns: dz = kd_scale (g - q g_sum) + ce_scale q, where ce_scale is
// cross-entropy's if it shares the softmax; returns the sum of f. The difference comes first: of a peaked row it is
// small beside its parts, whose products with kd_scale would be rounded.
template <class D>
float write_terms(const Buffer& z, const Buffer& y, int n, LogProbs student, LogProbs teacher, float parameter,
                  float kd_scale, float g_sum, float ce_scale, Buffer& dz) {
  float f_sum = 0.0F;
#pragma omp simd reduction(+ : f_sum)
  for (int j = 0; j < n; ++j) {
    const float log_q = student.at(z.at[j]), log_p = teacher.at(y.at[j]);
    const float q = exp_nonpositive(log_q);
    const Term term = D::at(parameter, exp_nonpositive(log_p), q, log_p, log_q);
    dz.at[j] = kd_scale * (term.g - q * g_sum) + ce_scale * q;
    f_sum += term.f;
  }
  return f_sum;
}

// dz += scale * probability over n columns.
void add_probs(const Buffer& z, int n, LogProbs probs, float scale, Buffer& dz) {
#pragma omp simd
  for (int j = 0; j < n; ++j) dz.at[j] += scale * exp_nonpositive(probs.at(z.at[j]));
}

struct Step {
  const Job& job;
  const Options& options = job.options;
  std::int64_t num_compared = options.num_compared;
  bool has_teacher = options.divergence != Divergence::kNone;
  bool has_labels = job.labels != nullptr;
  // Cross-entropy has a softmax of its own unless temperature and columns are the divergence's.
  bool own_ce;

  explicit Step(const Job& given) : job(given) {
    std::int64_t num_columns = 0;
    for (std::int64_t tile = 0; tile < job.student.num_tiles; ++tile) num_columns += job.student.tiles[tile].width;
    own_ce = has_labels && (options.temperature != 1.0F || num_compared != num_columns);
  }

  // How many of a tile's columns are compared.
  int compared(std::int64_t tile, int width) const {
    const std::int64_t left = num_compared - tile * options.tile_columns;
    return left <= 0 ? 0 : left < width ? static_cast<int>(left) : width;
  }

  template <class D>
  void run(std::int64_t index) const {
    const Row student{job.student, job.student.first_row + index};
    const Row teacher{job.teacher, job.teacher.first_row + index};
    const std::int64_t num_tiles = job.student.num_tiles;
    const float inverse_temperature = 1.0F / options.temperature;
    Buffer z, y, dz;

    Softmax q_stats{inverse_temperature}, p_stats{inverse_temperature}, ce_stats{1.0F};
    for (std::int64_t tile = 0; tile < num_tiles; ++tile) {
      const std::int64_t first = tile * options.tile_columns;
      const int width = student.width(tile), n = compared(tile, width);
      student.load(tile, z);
      if (n > 0) q_stats.take_in(z, n, first);
      if (has_teacher && n > 0) {
        teacher.load(tile, y);
        p_stats.take_in(y, n, first);
      }
      if (own_ce) ce_stats.take_in(z, width, first);
    }
    const LogProbs q(q_stats), p(p_stats), ce(own_ce ? ce_stats : q_stats);
    job.student_entropy[index] = q_stats.entropy();
    std::int64_t label = -1;
    if (has_labels) {
      label = job.labels[index];
      const std::int64_t tile = label / options.tile_columns;
      student.load(tile, z);
      job.ce[index] = -ce.at(z.at[label - tile * options.tile_columns]);
    }
    if (has_teacher) {
      job.teacher_entropy[index] = p_stats.entropy();
      job.agreement[index] = p_stats.best == q_stats.best ? 1.0F : 0.0F;
    }

    const bool kd_gradient = has_teacher && options.form_gradients && options.kd_weight != 0.0F;
    const bool ce_gradient = has_labels && options.form_gradients && options.ce_weight != 0.0F;
    Sums sums{0.0, -1.0};
    const bool summed = has_teacher && !(D::kSumKnown && kd_gradient);
    if (summed) {
      sums.g = 0.0;
      for (std::int64_t tile = num_tiles; tile-- > 0;) {
        const int n = compared(tile, student.width(tile));
        if (n == 0) continue;
        student.load(tile, z);
        teacher.load(tile, y);
        add_terms<D>(z, y, n, q, p, options.parameter, sums);
      }
    }
    if (options.form_gradients) {
      const float scale = job.row_scale[index];
      const float kd_scale = kd_gradient ? scale * options.kd_weight * inverse_temperature : 0.0F;
      const float ce_scale = ce_gradient ? scale * options.ce_weight : 0.0F;
      const float g_sum = static_cast<float>(sums.g), shared_ce_scale = own_ce ? 0.0F : ce_scale;
      // Each pass goes the other way than the one before: it begins with what is still in the cache.
      for (std::int64_t count = 0; count < num_tiles; ++count) {
        const std::int64_t tile = summed ? count : num_tiles - 1 - count;
        const int width = student.width(tile), n = compared(tile, width);
        student.load(tile, z);
        if (kd_gradient && n > 0) {
          teacher.load(tile, y);
          const float f = write_terms<D>(z, y, n, q, p, options.parameter, kd_scale, g_sum, shared_ce_scale, dz);
          if (!summed) sums.f += f;
          for (int j = n; j < width; ++j) dz.at[j] = 0.0F;
        } else {
          for (int j = 0; j < width; ++j) dz.at[j] = 0.0F;
          if (ce_gradient && !own_ce) add_probs(z, width, q, ce_scale, dz);
        }
        if (ce_gradient) {
          if (own_ce) add_probs(z, width, ce, ce_scale, dz);
          const std::int64_t column = label - tile * options.tile_columns;
          if (column >= 0 && column < width) dz.at[column] -= ce_scale;
        }
        through_head(width, z, dz);
        student.store(tile, dz);
      }
    }
    if (has_teacher) job.kd[index] = static_cast<float>(sums.f);
  }

  // From the gradient by the logits to that by what scale and softcap were applied to.
  void through_head(int width, const Buffer& z, Buffer& dz) const {
    if (options.softcap != 0.0F) {
      const float inverse = 1.0F / options.softcap;
#pragma omp simd
      for (int j = 0; j < width; ++j) {
        const float capped = z.at[j] * inverse;
        dz.at[j] *= 1.0F - capped * capped;
      }
    }
    if (options.logit_scale != 1.0F) {
#pragma omp simd
      for (int j = 0; j < width; ++j) dz.at[j] *= options.logit_scale;
    }
  }
};

struct NoDivergence {
  static constexpr bool kSumKnown = true;
  static Term at(float, float, float, float, float) { return {0.0F, 0.0F}; }
};

template <class D>
void compute_rows(const Job& job, std::int64_t begin, std::int64_t end) {
  const Step step(job);
  for (std::int64_t row = begin; row < end; ++row) step.run<D>(row);
}

}  // namespace

void compute(const Job& job, std::int64_t begin, std::int64_t end) {
  switch (job.options.divergence) {
    case Divergence::kNone:
      return compute_rows<NoDivergence>(job, begin, end);
    case Divergence::kForwardKL:
      return compute_rows<ForwardKL>(job, begin, end);
    case Divergence::kReverseKL:
      return compute_rows<ReverseKL>(job, begin, end);
    case Divergence::kJSD:
      return compute_rows<JSD>(job, begin, end);
    case Divergence::kSkewedForwardKL:
      return compute_rows<SkewedForwardKL>(job, begin, end);
    case Divergence::kSkewedReverseKL:
      return compute_rows<SkewedReverseKL>(job, begin, end);
    case Divergence::kTVD:
      return compute_rows<TVD>(job, begin, end);
    case Divergence::kJeffreys:
      return compute_rows<Jeffreys>(job, begin, end);
  }
}

}  // namespace kdflow::rows::KDFLOW_ISA
