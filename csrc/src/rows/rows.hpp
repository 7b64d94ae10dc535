// The row step of the fused loss on CPUs: from whole rows of logits to the rows' terms and
// dloss/dlogits, in place. The formulas are those of kernels/kdflow_kernels/torch_rows.py, which
// holds this code to account in the tests.
//
// compute.cpp is compiled once for each instruction set, with this interface; bindings.cpp picks.
#pragma once

#include <cstdint>

namespace kdflow::rows {

// The widest tile: the loops' buffers hold one.
inline constexpr int kMaxTileColumns = 512;

enum class Divergence : std::int32_t {
  kNone,  // no teacher
  kForwardKL,
  kReverseKL,
  kJSD,
  kSkewedForwardKL,
  kSkewedReverseKL,
  kTVD,
  kJeffreys,
};

// One tile of logits of a group of rows. An array of these is a Python int64 tensor (tiles, 4).
struct Tile {
  std::int64_t address;     // of the first row's first column
  std::int64_t row_stride;  // in elements
  std::int64_t width;       // columns
  std::int64_t maxima;      // address of the first row's maximum, which the logits are distances to; 0: none
};

// The logits of one side, bfloat16 or float.
struct Logits {
  bool bfloat16 = false;
  const Tile* tiles = nullptr;
  std::int64_t num_tiles = 0;
  std::int64_t first_row = 0;  // of these blocks, where the job's rows begin
};

struct Options {
  Divergence divergence = Divergence::kNone;
  float parameter = 0.0F;
  float temperature = 1.0F;
  float kd_weight = 0.0F;
  float ce_weight = 0.0F;
  float logit_scale = 1.0F;       // the student's; its logits come with scale and softcap applied
  float softcap = 0.0F;           // 0: none
  std::int64_t num_compared = 0;  // columns the divergence compares, the first ones of both sides
  std::int64_t tile_columns = 0;  // of every tile but a side's last
  bool form_gradients = false;
};

// Rows 0 to num_rows of both sides, of which each has its place in every array. Arrays that are not
// asked for are null.
struct Job {
  Options options;
  Logits student;  // gets dloss/dlogits where gradients are formed
  Logits teacher;
  std::int64_t num_rows = 0;
  const std::int64_t* labels = nullptr;
  const float* row_scale = nullptr;
  float* kd = nullptr;
  float* ce = nullptr;
  float* student_entropy = nullptr;
  float* teacher_entropy = nullptr;
  float* agreement = nullptr;
};

// Rows begin to end of a job, on the calling thread.
using Compute = void (*)(const Job& job, std::int64_t begin, std::int64_t end);

// Defined by compute.cpp, once for each instruction set.
namespace baseline {
void compute(const Job&, std::int64_t, std::int64_t);
}
namespace avx2 {
void compute(const Job&, std::int64_t, std::int64_t);
}
namespace avx512 {
void compute(const Job&, std::int64_t, std::int64_t);
}

}  // namespace kdflow::rows
