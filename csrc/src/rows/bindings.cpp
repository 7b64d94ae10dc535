// kdflow_kernels._rows: picks the instruction set, shares rows out over threads, and takes
// addresses from Python; kernels/kdflow_kernels/native_rows.py is its one caller.

#include <dlfcn.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "rows.hpp"

namespace py = pybind11;

namespace kdflow::rows {
namespace {

struct Kernel {
  const char* name;
  Compute compute;
};

constexpr Kernel kBaseline{"baseline", baseline::compute};
#if defined(__x86_64__)
constexpr Kernel kAvx2{"avx2", avx2::compute};
constexpr Kernel kAvx512{"avx512", avx512::compute};
#endif

std::vector<const Kernel*> supported_kernels() {
  std::vector<const Kernel*> found;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    found.push_back(&kAvx512);
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) {
    found.push_back(&kAvx2);
  }
#endif
  found.push_back(&kBaseline);
  return found;
}

const Kernel& kernel_named(const std::string& name) {
  for (const Kernel* kernel : supported_kernels()) {
    if (name.empty() || name == kernel->name) return *kernel;
  }
  throw std::invalid_argument("instruction_set: this processor has no " + name);
}

// Runs work on num_threads threads, on torch's own where its OpenMP library is found: those spin for
// a while after a matrix product, and threads beside them would wait for a core.
void run_in_team(unsigned num_threads, const std::function<void()>& work) {
  using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
  static const auto parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  if (num_threads == 1) return work();
  if (parallel != nullptr) {
    const auto call = [](void* given) { (*static_cast<const std::function<void()>*>(given))(); };
    return parallel(call, const_cast<std::function<void()>*>(&work), num_threads, 0);
  }
  std::vector<std::jthread> others;
  for (unsigned i = 1; i < num_threads; ++i) others.emplace_back(work);
  work();
}

// Numbers in a share of rows: small enough to even out, large enough to pay for its counter.
constexpr std::int64_t kShareNumbers = 1 << 15;

void run(const Job& job, Compute compute, int num_threads) {
  std::int64_t num_columns = 0;
  for (std::int64_t tile = 0; tile < job.student.num_tiles; ++tile) num_columns += job.student.tiles[tile].width;
  const std::int64_t share = std::max<std::int64_t>(1, kShareNumbers / std::max<std::int64_t>(1, num_columns));
  const std::int64_t num_shares = (job.num_rows + share - 1) / share;
  std::atomic<std::int64_t> next{0};
  const auto work = [&] {
    for (std::int64_t begin = share * next++; begin < job.num_rows; begin = share * next++) {
      compute(job, begin, std::min(begin + share, job.num_rows));
    }
  };
  run_in_team(static_cast<unsigned>(std::clamp<std::int64_t>(num_shares, 1, num_threads)), work);
}

template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace
}  // namespace kdflow::rows

PYBIND11_MODULE(_rows, module) {
  using namespace kdflow::rows;
  module.doc() = "The row step of the fused loss on CPUs; see kdflow_kernels.native_rows.";

  py::enum_<Divergence>(module, "Divergence")
      .value("None_", Divergence::kNone)
      .value("ForwardKL", Divergence::kForwardKL)
      .value("ReverseKL", Divergence::kReverseKL)
      .value("JSD", Divergence::kJSD)
      .value("SkewedForwardKL", Divergence::kSkewedForwardKL)
      .value("SkewedReverseKL", Divergence::kSkewedReverseKL)
      .value("TVD", Divergence::kTVD)
      .value("Jeffreys", Divergence::kJeffreys);

  module.attr("MAX_TILE_COLUMNS") = kMaxTileColumns;

  module.def("instruction_sets", [] {
    py::list names;
    for (const Kernel* kernel : supported_kernels()) names.append(kernel->name);
    return names;
  });

  py::class_<Options>(module, "Options")
      .def(py::init([](Divergence divergence, float parameter, float temperature, float kd_weight, float ce_weight,
                       float logit_scale, float softcap, std::int64_t num_compared, std::int64_t tile_columns,
                       bool form_gradients) {
             if (tile_columns > kMaxTileColumns) throw std::invalid_argument("tile_columns: too wide");
             return Options{divergence,  parameter, temperature,  kd_weight,    ce_weight,
                            logit_scale, softcap,   num_compared, tile_columns, form_gradients};
           }),
           py::kw_only(), py::arg("divergence"), py::arg("parameter"), py::arg("temperature"), py::arg("kd_weight"),
           py::arg("ce_weight"), py::arg("logit_scale"), py::arg("softcap"), py::arg("num_compared"),
           py::arg("tile_columns"), py::arg("form_gradients"));

  py::class_<Logits>(module, "Logits")
      .def(py::init([](bool bfloat16, std::uintptr_t tiles, std::int64_t num_tiles) {
             return Logits{bfloat16, pointer<const Tile>(tiles), num_tiles};
           }),
           py::kw_only(), py::arg("bfloat16") = false, py::arg("tiles") = 0, py::arg("num_tiles") = 0);

  module.def(
      "run",
      [](const Options& options, Logits student, std::int64_t first_row, const Logits& teacher, std::int64_t num_rows,
         std::uintptr_t labels, std::uintptr_t row_scale, std::uintptr_t kd, std::uintptr_t ce,
         std::uintptr_t student_entropy, std::uintptr_t teacher_entropy, std::uintptr_t agreement, int num_threads,
         const std::string& instruction_set) {
        student.first_row = first_row;
        const Job job{
            .options = options,
            .student = student,
            .teacher = teacher,
            .num_rows = num_rows,
            .labels = pointer<const std::int64_t>(labels),
            .row_scale = pointer<const float>(row_scale),
            .kd = pointer<float>(kd),
            .ce = pointer<float>(ce),
            .student_entropy = pointer<float>(student_entropy),
            .teacher_entropy = pointer<float>(teacher_entropy),
            .agreement = pointer<float>(agreement),
        };
        const Kernel& kernel = kernel_named(instruction_set);
        const py::gil_scoped_release release;
        run(job, kernel.compute, num_threads);
      },
      py::kw_only(), py::arg("options"), py::arg("student"), py::arg("first_row"), py::arg("teacher"),
      py::arg("num_rows"), py::arg("labels"), py::arg("row_scale"), py::arg("kd"), py::arg("ce"),
      py::arg("student_entropy"), py::arg("teacher_entropy"), py::arg("agreement"), py::arg("num_threads"),
      py::arg("instruction_set"));
}
