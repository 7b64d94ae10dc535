// The row kernel for GPUs with clusters (Hopper and later): whole rows of both sides' bf16 logits in the shared memory
// of a cluster, so that each is read once, whatever the divergence, where row_kernels.py reads it two or three times.
//
// A cluster of KDFLOW_CLUSTER blocks takes some rows, one after another. Every block holds a slice of a row's columns,
// every thread every KDFLOW_THREADS-th vector of 8 logits of the slice; no thread reads what another one copied. Blocks
// tell each other their statistics through distributed shared memory. While one cluster waits, the other blocks of a
// multiprocessor work.
//
//   1. take the slice into the statistics of both softmaxes;
//   2. where the sum over the vocabulary of df/dlog q is not known beforehand, that and the loss;
//   3. dloss/dlogits, over the student's logits or beside them; a vector that has been read makes room for the next
//   row's.
//
// Compiled at run time for one form of the loss, by cluster_rows.py, which defines the names in capitals.
#ifdef __CUDACC__
#include "device.hpp"
#else
#include "host_device.hpp"
#endif

namespace {

constexpr Bits kLowestPair = 0xF149F149U;  // problem.LOWEST_LOGIT, twice
constexpr float kTiny = 1.17549435e-38F;
constexpr float kLogE = 1.44269504F;  // logarithms are to base 2
constexpr int kNoColumn = 1 << 30;
constexpr int kWidth = 8;  // logits of a vector
constexpr int kWarps = KDFLOW_THREADS / 32;
constexpr int kTurns = (KDFLOW_SLICE / kWidth + KDFLOW_THREADS - 1) / KDFLOW_THREADS;  // vectors of a thread
constexpr int kHalf = (kTurns + 1) / 2;

constexpr bool kHasLabels = KDFLOW_HAS_LABELS;
constexpr bool kOwnCE = KDFLOW_OWN_CE;  // cross-entropy has a softmax of its own, at temperature 1
constexpr bool kFormGradient = KDFLOW_FORM_GRADIENT;

KDFLOW_INLINE float log_positive(float x) { return device::log2(x); }

#include "divergences.hpp"

using Divergence = KDFLOW_DIVERGENCE;
constexpr bool kSumPass = !(Divergence::kSumKnown && kFormGradient);

KDFLOW_INLINE float lower(Bits pair) { return device::from_bits(pair << 16); }
KDFLOW_INLINE float upper(Bits pair) { return device::from_bits(pair & 0xFFFF0000U); }
KDFLOW_INLINE float logit(const Bits4& vector, int j) {
  return j % 2 == 0 ? lower(vector.at[j / 2]) : upper(vector.at[j / 2]);
}

// As ctypes.Structure in cluster_rows.py. Strides are in logits, rows begin at multiples of 16 bytes, and whole vectors
// are readable up to the row's end.
struct Parameters {
  const Bits4* student;
  const Bits4* teacher;
  Bits4* gradient;
  long long student_stride, teacher_stride, gradient_stride;
  const long long* labels;
  const float* row_scale;
  float* kd;  // (rows, KDFLOW_CLUSTER): each block's part of a row's sum
  float* ce;
  float* student_entropy;
  float* teacher_entropy;
  float* agreement;
  int num_rows, rows_per_cluster, num_columns;
  float inverse_temperature, kd_weight, ce_weight, parameter;
#ifdef KDFLOW_PHASES
  Bits* cycles;  // (blocks, kNumPhases + 1)
#endif
};

// What a block's first thread does, one after another; as bench/tune/phases.py names them.
enum Phase { kStart, kCopies, kStatistics, kBlock, kTell, kCluster, kSums, kGradient, kStore, kRest, kNumPhases };

// How many cycles each phase takes, over all rows of a block: for bench.tune, which defines KDFLOW_PHASES; the
// launcher's kernels have no clock.
#ifdef KDFLOW_PHASES
class Clock {
  Bits* const spent_ = device::cycles();
  const Bits begun_ = device::clock();
  Bits last_ = begun_;

 public:
  KDFLOW_INLINE Clock() {
    if (device::thread() != 0) return;
    for (int phase = 0; phase < kNumPhases; ++phase) spent_[phase] = 0;
  }
  KDFLOW_INLINE void end(Phase phase) {
    if (device::thread() != 0) return;
    const Bits now = device::clock();
    spent_[phase] += now - last_;
    last_ = now;
  }
  // With the whole time at the end, which is the sum of all.
  KDFLOW_INLINE void write(const Parameters& p) const {
    if (device::thread() != 0) return;
    Bits* const cycles = p.cycles + device::block() * (kNumPhases + 1);
    for (int phase = 0; phase < kNumPhases; ++phase) cycles[phase] = spent_[phase];
    cycles[kNumPhases] = last_ - begun_;
  }
};
#else
struct Clock {
  KDFLOW_INLINE void end(Phase) {}
  KDFLOW_INLINE void write(const Parameters&) const {}
};
#endif

// Of a part of a row: maximum, total = sum 2^d and moment = sum 2^d d with d = (z - top) exponent, and the first column
// of the maximum.
struct alignas(16) Statistics {
  float top = lower(kLowestPair), total = 0.0F, moment = 0.0F;
  int column = kNoColumn;
};

struct alignas(16) Sums {
  float f = 0.0F, g = 0.0F, unused[2] = {0.0F, 0.0F};
};

// The parts of every kLanes neighbouring lanes as one; those of all lanes are to hold the same columns of the row.
template <int kLanes>
KDFLOW_INLINE Statistics merge(Statistics part, float exponent) {
  const float top = device::max_over<kLanes>(part.top);
  const float shift = (part.top - top) * exponent;
  const float decay = device::exp2(shift);
  return {top, device::sum_over<kLanes>(decay * part.total),
          device::sum_over<kLanes>(decay * (part.moment + part.total * shift)),
          device::warp_min(part.top == top ? part.column : kNoColumn)};
}
template <int kLanes>
KDFLOW_INLINE Sums merge(Sums part, float) {
  return {device::sum_over<kLanes>(part.f), device::sum_over<kLanes>(part.g)};
}

// Where a cluster's parts of one softmax, or of sums, come together.
template <class Part>
struct Meeting {
  Part of_warps[kWarps];
  Part of_blocks[2][KDFLOW_CLUSTER];  // of rows with even and odd numbers: one block may be a row ahead of another

  KDFLOW_INLINE void bring(Part mine, float exponent) {
    mine = merge<32>(mine, exponent);
    if (device::thread() % 32 == 0) of_warps[device::thread() / 32] = mine;
  }
  // For one warp, after sync_threads: the block's part.
  KDFLOW_INLINE Part of_block(float exponent) const {
    const int lane = device::thread() % 32;
    return merge<32>(lane < kWarps ? of_warps[lane] : Part{}, exponent);
  }
  KDFLOW_INLINE Part tell(int row, int rank, float exponent) {
    const Part part = of_block(exponent);
    const int lane = device::thread() % 32;
    if (lane < KDFLOW_CLUSTER) {
      device::store_remote(&of_blocks[row % 2][rank], lane, __builtin_bit_cast(Bits4, part));
    }
    return part;
  }
  // After the cluster's barrier: the row's.
  KDFLOW_INLINE Part take(int row, float exponent) const {
    return merge<KDFLOW_CLUSTER>(of_blocks[row % 2][device::thread() % KDFLOW_CLUSTER], exponent);
  }
};

struct Meetings {
  Meeting<Statistics> student, teacher, ce;
  Meeting<Sums> sums;
};
static_assert(sizeof(Meetings) == 64 * (kWarps + 2 * KDFLOW_CLUSTER));  // cluster_rows.py counts on it
constexpr int kSoftmaxes = kOwnCE ? 3 : 2;

// The columns of a row that this block holds.
struct Slice {
  const Parameters& p;
  const int rank, first, thread;      // first: its first column
  const int num_vectors, cut_vector;  // cut_vector: the one in which the row ends, if it is no whole one
  Bits4* const student;               // in shared memory
  Bits4* const teacher;

  KDFLOW_INLINE explicit Slice(const Parameters& given)
      : p(given),
        rank(device::block() % KDFLOW_CLUSTER),
        first(rank * KDFLOW_SLICE),
        thread(device::thread()),
        num_vectors(count_vectors(given.num_columns - first)),
        cut_vector(given.num_columns % kWidth == 0 ? -1 : (given.num_columns - first) / kWidth),
        student(device::dynamic_shared() + sizeof(Meetings) / sizeof(Bits4)),
        teacher(student + KDFLOW_SLICE / kWidth) {}

  KDFLOW_INLINE static int count_vectors(int columns) {
    const int held = columns < KDFLOW_SLICE ? columns : KDFLOW_SLICE;
    return held <= 0 ? 0 : (held + kWidth - 1) / kWidth;
  }

  // Where a column of the row is in the slice; kNoColumn: elsewhere.
  KDFLOW_INLINE int column(long long of_row) const {
    const long long found = of_row - first;
    return found >= 0 && found < KDFLOW_SLICE ? static_cast<int>(found) : kNoColumn;
  }
  // The vector that is this thread's turn; it may lie beyond the slice.
  KDFLOW_INLINE int vector(int turn) const { return thread + turn * KDFLOW_THREADS; }
  // What this thread's vectors of the turns before kTo are below.
  template <int kTo>
  KDFLOW_INLINE int end() const {
    return vector(kTo) < num_vectors ? vector(kTo) : num_vectors;
  }

  template <class T>
  KDFLOW_INLINE T* place(T* side, long long stride, int row) const {
    return side + (row * stride + first) / kWidth;
  }

  KDFLOW_INLINE void copy_vector(int row, int v) const {
    device::copy_async(student + v, place(p.student, p.student_stride, row) + v);
    device::copy_async(teacher + v, place(p.teacher, p.teacher_stride, row) + v);
  }
  template <int kFrom, int kTo>
  KDFLOW_INLINE void copy(int row) const {
#pragma unroll
    for (int turn = kFrom; turn < kTo; ++turn) {
      if (vector(turn) < num_vectors) copy_vector(row, vector(turn));
    }
    device::commit_copies();
  }
};

KDFLOW_INLINE float highest(const Bits4& vector) {
  const Bits larger = device::max_of_halves(device::max_of_halves(vector.at[0], vector.at[1]),
                                            device::max_of_halves(vector.at[2], vector.at[3]));
  return lower(larger) < upper(larger) ? upper(larger) : lower(larger);
}

// This thread's part of one softmax, taken in some vectors at a time.
struct Softmax {
  const float exponent;
  Statistics found;
  int best = -1;            // the vector of the first maximum
  float total_at_1 = 0.0F;  // the sum of exponentials at temperature 1

  KDFLOW_INLINE explicit Softmax(float given) : exponent(given) {}

  template <bool kAtOne, int kFrom, int kTo>
  KDFLOW_INLINE void take_in(const Slice& slice, const Bits4* side) {
    Bits4 held[kTo - kFrom + 1];
    float top = found.top;
#pragma unroll
    for (int turn = kFrom; turn < kTo; ++turn) {
      const int v = slice.vector(turn);
      Bits4& vector = held[turn - kFrom];
      vector = {{kLowestPair, kLowestPair, kLowestPair, kLowestPair}};
      if (v < slice.num_vectors) vector = side[v];
      const float here = highest(vector);
      best = here > top ? v : best;
      top = here > top ? here : top;
    }
    const float shift = (found.top - top) * exponent;
    const float decay = device::exp2(shift);
    found.moment = decay * (found.moment + found.total * shift);
    found.total *= decay;
    if constexpr (kAtOne) total_at_1 *= device::exp2((found.top - top) * kLogE);
    found.top = top;
#pragma unroll
    for (int turn = kFrom; turn < kTo; ++turn) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) add<kAtOne>(logit(held[turn - kFrom], j));
    }
  }

  template <bool kAtOne>
  KDFLOW_INLINE void add(float z) {
    // Not z exponent - top exponent: in one fused instruction that leaves the rounding of top exponent, which is large
    // where logits are.
    const float d = (z - found.top) * exponent;
    const float e = device::exp2(d);
    found.total += e;
    found.moment += e * d;
    if constexpr (kAtOne) total_at_1 += device::exp2((z - found.top) * kLogE);
  }

  // With the column of the maximum, from its vector.
  KDFLOW_INLINE Statistics statistics(const Slice& slice, const Bits4* side) const {
    Statistics with_column = found;
    if (best >= 0) {
      const Bits4 vector = side[best];
      int place = kNoColumn;
#pragma unroll
      for (int j = kWidth - 1; j >= 0; --j) place = logit(vector, j) == found.top ? j : place;
      with_column.column = slice.first + best * kWidth + place;
    }
    return with_column;
  }
};

// Log-probabilities to base 2: (z - top) exponent - log_total.
struct LogProbs {
  float top, exponent, log_total;
  KDFLOW_INLINE LogProbs(const Statistics& found, float given)
      : top(found.top), exponent(given), log_total(device::log2(found.total)) {}
  KDFLOW_INLINE float at(float z) const { return (z - top) * exponent - log_total; }
};

KDFLOW_INLINE float entropy(const Statistics& found) {
  return (device::log2(found.total) - found.moment / found.total) / kLogE;
}

// What passes 2 and 3 know of a row.
struct Row {
  const Slice& slice;
  const int number, label;  // label: its column in the slice, or kNoColumn
  const LogProbs q_at, p_at, ce_at;

  struct Terms {
    float f, g, q, z;
  };
  KDFLOW_INLINE Terms terms(const Bits4& z, const Bits4& y, int j) const {
    const float log_q = q_at.at(logit(z, j)), log_p = p_at.at(logit(y, j));
    const float q = device::exp2(log_q);
    const Term term = Divergence::at(slice.p.parameter, device::exp2(log_p), q, log_p, log_q);
    return {term.f, term.g, q, logit(z, j)};
  }

  // Where this is the last pass over the row it asks for the same vectors of the next one.
  template <int kFrom, int kTo>
  KDFLOW_INLINE void add_terms(bool another, Sums& sums) const {
    const int end = slice.end<kTo>();
#pragma unroll 1
    for (int v = slice.vector(kFrom); v < end; v += KDFLOW_THREADS) {
      const Bits4 z = slice.student[v], y = slice.teacher[v];
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const Terms found = terms(z, y, j);
        sums.f += found.f;
        sums.g += found.g;
      }
      if (!kFormGradient && another) slice.copy_vector(number + 1, v);
    }
    if constexpr (!kFormGradient) device::commit_copies();
  }

  struct Scales {
    float g, q, ce;
  };
  // dz = scales.g g + scales.q q, and cross-entropy's part; asks for the same vectors of the next row.
  template <int kFrom, int kTo>
  KDFLOW_INLINE void write_gradient(const Scales& scales, bool another, Sums& sums, Clock& clock) const {
    const Parameters& p = slice.p;
    Bits4* const gradient = slice.place(p.gradient, p.gradient_stride, number);
    const int end = slice.end<kTo>();
#pragma unroll 1
    for (int v = slice.vector(kFrom); v < end; v += KDFLOW_THREADS) {
      const Bits4 z = slice.student[v], y = slice.teacher[v];
      float dz[kWidth];
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const Terms found = terms(z, y, j);
        if constexpr (!kSumPass) sums.f += found.f;
        dz[j] = scales.g * found.g + scales.q * found.q;
        if constexpr (kOwnCE) dz[j] += scales.ce * device::exp2(ce_at.at(found.z));
      }
      if (kHasLabels && label / kWidth == v) {
#pragma unroll
        for (int j = 0; j < kWidth; ++j) dz[j] -= j == label % kWidth ? scales.ce : 0.0F;
      }
      if (v == slice.cut_vector) {  // the padding stays without mass
#pragma unroll
        for (int j = 0; j < kWidth; ++j) dz[j] = j < p.num_columns % kWidth ? dz[j] : lower(kLowestPair);
      }
      Bits4 packed;
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) packed.at[pair] = device::narrow(dz[2 * pair], dz[2 * pair + 1]);
      clock.end(kGradient);
      gradient[v] = packed;
      if (another) slice.copy_vector(number + 1, v);
      clock.end(kStore);
    }
    device::commit_copies();
  }
};

}  // namespace

KDFLOW_KERNEL void cluster_rows(KDFLOW_PARAMETERS Parameters p) {
  Meetings& meet = *reinterpret_cast<Meetings*>(device::dynamic_shared());
  const Slice slice(p);
  const int thread = slice.thread, warp = thread / 32, rank = slice.rank;
  const float exponent = p.inverse_temperature * kLogE;
  int row = device::block() / KDFLOW_CLUSTER * p.rows_per_cluster;
  const int end = row + p.rows_per_cluster < p.num_rows ? row + p.rows_per_cluster : p.num_rows;

  Clock clock;
  device::cluster_arrive(false);
  slice.copy<0, kHalf>(row);
  slice.copy<kHalf, kTurns>(row);
  device::cluster_wait();  // all blocks run and can be written to
  clock.end(kStart);

  for (; row < end; ++row) {
    const float scale = kFormGradient ? p.row_scale[row] : 0.0F;
    const int label = kHasLabels ? slice.column(p.labels[row]) : kNoColumn;

    // 1. In two halves, so that the second one arrives while the first is taken in.
    Softmax of_student(exponent), of_teacher(exponent);
    device::wait_copies<1>(0.0F);
    clock.end(kCopies);
    of_student.take_in<kOwnCE, 0, kHalf>(slice, slice.student);
    of_teacher.take_in<false, 0, kHalf>(slice, slice.teacher);
    clock.end(kStatistics);
    device::wait_copies<0>(of_student.found.total + of_teacher.found.total);
    clock.end(kCopies);
    of_student.take_in<kOwnCE, kHalf, kTurns>(slice, slice.student);
    of_teacher.take_in<false, kHalf, kTurns>(slice, slice.teacher);

    meet.student.bring(of_student.statistics(slice, slice.student), exponent);
    meet.teacher.bring(of_teacher.statistics(slice, slice.teacher), exponent);
    if constexpr (kOwnCE) meet.ce.bring({of_student.found.top, of_student.total_at_1}, kLogE);
    clock.end(kStatistics);
    device::sync_threads();
    clock.end(kBlock);
    if (warp == 0) meet.student.tell(row, rank, exponent);
    if (warp == 1 % kWarps) meet.teacher.tell(row, rank, exponent);
    if constexpr (kOwnCE) {
      if (warp == 2 % kWarps) meet.ce.tell(row, rank, kLogE);
    }
    device::cluster_arrive(warp < kSoftmaxes);
    clock.end(kTell);
    device::cluster_wait();
    clock.end(kCluster);
    const Statistics student = meet.student.take(row, exponent), teacher = meet.teacher.take(row, exponent);
    const LogProbs q_at(student, exponent);
    const LogProbs ce_at(kOwnCE ? meet.ce.take(row, kLogE) : student, kLogE);
    const Row here{slice, row, label, q_at, LogProbs(teacher, exponent), ce_at};
    if (kHasLabels && label != kNoColumn && label / kWidth % KDFLOW_THREADS == thread) {
      p.ce[row] = -ce_at.at(logit(slice.student[label / kWidth], label % kWidth)) / kLogE;
    }

    // 2.
    const bool another = row + 1 < end;
    Sums sums;
    float gradient_sum = -1.0F;  // where it is known
    if constexpr (kSumPass) {
      if constexpr (kFormGradient) {
        here.add_terms<0, kTurns>(false, sums);
      } else {
        here.add_terms<0, kHalf>(another, sums);
        here.add_terms<kHalf, kTurns>(another, sums);
      }
      meet.sums.bring(sums, 0.0F);
      clock.end(kSums);
      device::sync_threads();
      clock.end(kBlock);
      if constexpr (kFormGradient) {
        if (warp == 0) sums.f = meet.sums.tell(row, rank, 0.0F).f;
        device::cluster_arrive(warp == 0);
        clock.end(kTell);
        device::cluster_wait();
        clock.end(kCluster);
        gradient_sum = meet.sums.take(row, 0.0F).g / Divergence::kScaleG;
      }
    }

    // 3.
    if constexpr (kFormGradient) {
      const float ce_scale = kHasLabels ? scale * p.ce_weight : 0.0F;
      const float kd_scale = scale * p.kd_weight * p.inverse_temperature;
      const Row::Scales scales{kd_scale / Divergence::kScaleG, (kOwnCE ? 0.0F : ce_scale) - kd_scale * gradient_sum,
                               ce_scale};
      here.write_gradient<0, kHalf>(scales, another, sums, clock);
      here.write_gradient<kHalf, kTurns>(scales, another, sums, clock);
      if constexpr (!kSumPass) {
        meet.sums.bring(sums, 0.0F);
        clock.end(kGradient);
        device::sync_threads();
        clock.end(kBlock);
      }
    }
    if (warp == 0) {
      const float f = kSumPass && kFormGradient ? sums.f : meet.sums.of_block(0.0F).f;
      if (thread == 0) {
        p.kd[row * KDFLOW_CLUSTER + rank] = f / Divergence::kScaleF;
        if (rank == 0) {
          p.student_entropy[row] = entropy(student);
          p.teacher_entropy[row] = entropy(teacher);
          p.agreement[row] = student.column == teacher.column ? 1.0F : 0.0F;
        }
      }
    }
    clock.end(kRest);
  }
  clock.write(p);
}
