// The row step on memory that ends where the rows end: numbers against double, bounds by the sanitizers.
// How it agrees with the row step in torch is tested from Python (tests/kernels/test_native_rows.py).
#include "../src/rows/rows.hpp"

#include <cmath>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "check.hpp"

using namespace kdflow::rows;

namespace {

constexpr int kRows = 3, kTileColumns = 512;

std::uint16_t to_bfloat16(float value) {
  return static_cast<std::uint16_t>(__builtin_bit_cast(std::uint32_t, value) >> 16);
}
float from_bfloat16(std::uint16_t bits) { return __builtin_bit_cast(float, static_cast<std::uint32_t>(bits) << 16); }

// One side's logits, each tile an allocation of its own.
struct Side {
  bool bfloat16;
  std::vector<int> widths;
  std::vector<std::unique_ptr<char[]>> memory;
  std::vector<Tile> tiles;

  Side(int columns, bool in_bfloat16) : bfloat16(in_bfloat16) {
    for (int first = 0; first < columns; first += kTileColumns) {
      const int width = std::min(kTileColumns, columns - first);
      const std::size_t item = bfloat16 ? sizeof(std::uint16_t) : sizeof(float);
      memory.push_back(std::make_unique<char[]>(kRows * static_cast<std::size_t>(width) * item));
      tiles.push_back({reinterpret_cast<std::int64_t>(memory.back().get()), width, width, 0});
    }
  }
  float get(int row, int column) const {
    const Tile& tile = tiles[static_cast<std::size_t>(column / kTileColumns)];
    const auto at = row * tile.row_stride + column % kTileColumns;
    return bfloat16 ? from_bfloat16(reinterpret_cast<const std::uint16_t*>(tile.address)[at])
                    : reinterpret_cast<const float*>(tile.address)[at];
  }
  void set(int row, int column, float value) {
    const Tile& tile = tiles[static_cast<std::size_t>(column / kTileColumns)];
    const auto at = row * tile.row_stride + column % kTileColumns;
    if (bfloat16) {
      reinterpret_cast<std::uint16_t*>(tile.address)[at] = to_bfloat16(value);
    } else {
      reinterpret_cast<float*>(tile.address)[at] = value;
    }
  }
  Logits logits() const { return {bfloat16, tiles.data(), static_cast<std::int64_t>(tiles.size())}; }
};

std::vector<double> log_probs(const Side& side, int row, int columns, double temperature) {
  std::vector<double> z;
  for (int v = 0; v < columns; ++v) z.push_back(side.get(row, v) / temperature);
  double top = z[0], sum = 0;
  for (const double x : z) top = std::max(top, x);
  for (const double x : z) sum += std::exp(x - top);
  for (double& x : z) x -= top + std::log(sum);
  return z;
}

struct Setup {
  Side student, teacher;
  std::vector<std::int64_t> labels;
  std::vector<float> scale, kd, ce, entropy, teacher_entropy, agreement;
  Job job;

  Setup(int columns, int compared, bool bfloat16, Divergence divergence, float temperature)
      : student(columns, bfloat16),
        teacher(compared, bfloat16),
        labels{0, columns / 2, columns - 1},
        scale(kRows, 1.0F),
        kd(kRows),
        ce(kRows),
        entropy(kRows),
        teacher_entropy(kRows),
        agreement(kRows) {
    std::mt19937 random(static_cast<unsigned>(columns));
    std::normal_distribution<float> normal(0.0F, 3.0F);
    for (int row = 0; row < kRows; ++row) {
      for (int v = 0; v < columns; ++v) student.set(row, v, normal(random));
      for (int v = 0; v < compared; ++v) teacher.set(row, v, normal(random));
    }
    job.options = {divergence, 0.3F, temperature, 1.0F, 0.5F, 1.0F, 0.0F, compared, kTileColumns, true};
    job.student = student.logits();
    job.teacher = teacher.logits();
    job.num_rows = kRows;
    job.labels = labels.data();
    job.row_scale = scale.data();
    job.kd = kd.data();
    job.ce = ce.data();
    job.student_entropy = entropy.data();
    job.teacher_entropy = teacher_entropy.data();
    job.agreement = agreement.data();
  }
};

bool near(double a, double b, double tolerance) { return std::abs(a - b) <= tolerance * (1.0 + std::abs(b)); }

}  // namespace

TEST(forward_kl_and_cross_entropy) {
  for (const bool bfloat16 : {false, true}) {
    for (const auto& [columns, compared] : {std::pair{7, 7}, {512, 512}, {1061, 1061}, {1061, 1000}, {1061, 512}}) {
      for (const float temperature : {1.0F, 2.0F}) {
        Setup setup(columns, compared, bfloat16, Divergence::kForwardKL, temperature);
        std::vector<std::vector<double>> wanted;
        for (int row = 0; row < kRows; ++row) {
          const auto q = log_probs(setup.student, row, compared, temperature);
          const auto p = log_probs(setup.teacher, row, compared, temperature);
          const auto whole = log_probs(setup.student, row, columns, 1.0);
          const auto label = static_cast<std::size_t>(setup.labels[static_cast<std::size_t>(row)]);
          double kd = 0;
          std::vector<double> dz(static_cast<std::size_t>(columns));
          for (std::size_t v = 0; v < dz.size(); ++v) {
            dz[v] = 0.5 * (std::exp(whole[v]) - (v == label ? 1.0 : 0.0));
            if (v < p.size()) {
              kd += std::exp(p[v]) * (p[v] - q[v]);
              dz[v] += (std::exp(q[v]) - std::exp(p[v])) / temperature;
            }
          }
          wanted.push_back(dz);
          wanted.push_back({kd, -whole[label]});
        }
        baseline::compute(setup.job, 0, kRows);
        for (int row = 0; row < kRows; ++row) {
          const auto index = static_cast<std::size_t>(row);
          CHECK(near(setup.kd[index], wanted[2 * index + 1][0], 1e-5));
          CHECK(near(setup.ce[index], wanted[2 * index + 1][1], 1e-5));
          for (int v = 0; v < columns; ++v) {
            const double exact = wanted[2 * index][static_cast<std::size_t>(v)];
            CHECK(std::abs(setup.student.get(row, v) - exact) <= (bfloat16 ? 5e-3 : 1e-5) * std::abs(exact) + 1e-7);
          }
        }
      }
    }
  }
}

TEST(every_divergence_stays_inside_its_rows) {
  for (int kind = 0; kind <= static_cast<int>(Divergence::kJeffreys); ++kind) {
    for (const bool bfloat16 : {false, true}) {
      Setup setup(1061, 1061, bfloat16, static_cast<Divergence>(kind), 1.0F);
      baseline::compute(setup.job, 0, kRows);
      for (const float loss : setup.kd) CHECK(std::isfinite(loss) && loss >= 0.0F);
    }
  }
}

TEST(nonsense_in_a_row_shows_in_it_alone) {
  for (const float value : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    Setup setup(1061, 1061, false, Divergence::kJSD, 1.0F);
    setup.student.set(1, 600, value);
    baseline::compute(setup.job, 0, kRows);
    CHECK(std::isnan(setup.kd[1]) && std::isnan(setup.ce[1]));
    CHECK(std::isfinite(setup.kd[0]) && std::isfinite(setup.kd[2]));
    CHECK(std::isfinite(setup.student.get(2, 1060)));
  }
}

int main(int argc, char** argv) { return check::run(argc, argv); }
