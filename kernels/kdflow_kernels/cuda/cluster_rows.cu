// The row kernel for GPUs with clusters (Hopper and later): whole rows of both sides' bf16 logits in the shared memory
// of a cluster, so that each is read once, whatever the divergence, where row_kernels.py reads it two or three times.
//
// A cluster of KDFLOW_CLUSTER blocks takes a row. Every block holds a slice of its columns, every thread every
// KDFLOW_THREADS-th vector of 8 logits of the slice; no thread reads what another one copied. Blocks tell each other
// their statistics through distributed shared memory. While one cluster waits, the other blocks of a multiprocessor
// work.
//
//   1. copy the slice, and take it into the statistics of both softmaxes;
//   2. where the sum over the vocabulary of df/dlog q is not known beforehand, that and the loss;
//   3. dloss/dlogits, over the student's logits or beside them.
//
// Compiled at run time for one form of the loss, by cluster_rows.py, which defines the names in capitals.
#ifdef __CUDACC__
#include "device.hpp"
#else
#include "host_device.hpp"
#endif

namespace {

constexpr float kLowest = -1e30F;  // problem.LOWEST_LOGIT
constexpr float kTiny = 1.17549435e-38F;
constexpr float kLogE = 1.44269504F;  // logarithms are to base 2
constexpr int kNoColumn = 1 << 30;
constexpr int kWidth = 8;  // logits of a vector
constexpr int kWarps = KDFLOW_THREADS / 32;

constexpr bool kHasLabels = KDFLOW_HAS_LABELS;
constexpr bool kOwnCE = KDFLOW_OWN_CE;  // cross-entropy has a softmax of its own, at temperature 1
constexpr bool kFormGradient = KDFLOW_FORM_GRADIENT;

KDFLOW_INLINE float log_positive(float x) { return device::log2(x); }

#include "divergences.hpp"

using Divergence = KDFLOW_DIVERGENCE;
constexpr bool kSumPass = !(Divergence::kSumKnown && kFormGradient);

// As ctypes.Structure in cluster_rows.py. Strides are in logits, rows begin at multiples of 16 bytes, and whole vectors
// are readable up to the row's end.
struct Parameters {
  const Bits4* student;
  const Bits4* teacher;
  Bits4* gradient;
  long long student_stride, teacher_stride, gradient_stride;
  const long long* labels;
  const float* row_scale;
  float* kd;
  float* ce;
  float* student_entropy;
  float* teacher_entropy;
  float* agreement;
  int num_columns;
  int slice;  // columns of a block, a multiple of kWidth
  float inverse_temperature, kd_weight, ce_weight, parameter;
};

// Of a part of a row: maximum, total = sum 2^d and moment = sum 2^d d with d = (z - top) exponent, and the first column
// of the maximum.
struct alignas(16) Statistics {
  float top = kLowest, total = 0.0F, moment = 0.0F;
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
  Part of_blocks[KDFLOW_CLUSTER];

  // First half: the threads' parts as the block's.
  KDFLOW_INLINE void bring(Part mine, float exponent) {
    mine = merge<32>(mine, exponent);
    if (device::thread() % 32 == 0) of_warps[device::thread() / 32] = mine;
  }
  // For the first warp, after sync_threads: tells the block's part to the first num_blocks blocks.
  KDFLOW_INLINE void tell(int rank, int num_blocks, float exponent) {
    const int lane = device::thread();
    const Part whole = merge<32>(lane < kWarps ? of_warps[lane] : Part{}, exponent);
    if (lane < num_blocks) device::store_remote(&of_blocks[rank], lane, __builtin_bit_cast(Bits4, whole));
  }
  // After the cluster's barrier: the row's.
  KDFLOW_INLINE Part take(float exponent) const {
    return merge<KDFLOW_CLUSTER>(of_blocks[device::thread() % KDFLOW_CLUSTER], exponent);
  }
};

struct Meetings {
  Meeting<Statistics> student, teacher, ce;
  Meeting<Sums> sums;
};
static_assert(sizeof(Meetings) == 64 * (kWarps + KDFLOW_CLUSTER));  // cluster_rows.py counts on it

// The threads' sums as the row's, which the first num_blocks blocks get.
KDFLOW_INLINE void exchange(Meeting<Sums>& meeting, Sums& sums, int num_blocks, int rank) {
  meeting.bring(sums, 0.0F);
  device::sync_threads();
  if (device::thread() < 32) meeting.tell(rank, num_blocks, 0.0F);
  device::cluster_arrive();
  device::cluster_wait();
  if (rank < num_blocks) sums = meeting.take(0.0F);
}

struct Row {
  const Parameters& p;
  const int rank, row, first;  // first: column of this block's slice
  const int num_vectors;       // of the slice
  Bits4* const student;        // in shared memory
  Bits4* const teacher;

  KDFLOW_INLINE explicit Row(const Parameters& given)
      : p(given),
        rank(device::block() % KDFLOW_CLUSTER),
        row(device::block() / KDFLOW_CLUSTER),
        first(rank * given.slice),
        num_vectors(count_vectors(given.num_columns - first, given.slice)),
        student(device::dynamic_shared() + sizeof(Meetings) / sizeof(Bits4)),
        teacher(student + given.slice / kWidth) {}

  KDFLOW_INLINE static int count_vectors(int columns, int most) {
    const int held = columns < most ? columns : most;
    return held <= 0 ? 0 : (held + kWidth - 1) / kWidth;
  }

  template <class T>
  KDFLOW_INLINE T* place(T* side, long long stride) const {
    return side + (row * stride + first) / kWidth;
  }

  // Asks for this thread's vectors begin to end.
  KDFLOW_INLINE void copy(int begin, int end) const {
    const Bits4* of_student = place(p.student, p.student_stride);
    const Bits4* of_teacher = place(p.teacher, p.teacher_stride);
    for (int v = begin; v < end; v += KDFLOW_THREADS) {
      device::copy_async(student + v, of_student + v);
      device::copy_async(teacher + v, of_teacher + v);
    }
    device::commit_copies();
  }
};

KDFLOW_INLINE float lower(Bits pair) { return device::from_bits(pair << 16); }
KDFLOW_INLINE float upper(Bits pair) { return device::from_bits(pair & 0xFFFF0000U); }

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

  template <bool kAtOne>
  KDFLOW_INLINE void take_in(const Bits4* side, int begin, int end) {
    float top = found.top;
    for (int v = begin; v < end; v += KDFLOW_THREADS) {
      const float here = highest(side[v]);
      best = here > top ? v : best;
      top = here > top ? here : top;
    }
    const float shift = (found.top - top) * exponent;
    const float decay = device::exp2(shift);
    found.moment = decay * (found.moment + found.total * shift);
    found.total *= decay;
    if constexpr (kAtOne) total_at_1 *= device::exp2((found.top - top) * kLogE);
    found.top = top;
    for (int v = begin; v < end; v += KDFLOW_THREADS) {
      const Bits4 vector = side[v];
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        add<kAtOne>(lower(vector.at[pair]));
        add<kAtOne>(upper(vector.at[pair]));
      }
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

  // The column of the maximum, from its vector.
  KDFLOW_INLINE Statistics statistics(const Bits4* side, int first) const {
    Statistics with_column = found;
    if (best >= 0) {
      const Bits4 vector = side[best];
      int place = kNoColumn;
#pragma unroll
      for (int pair = 3; pair >= 0; --pair) {
        place = upper(vector.at[pair]) == found.top ? 2 * pair + 1 : place;
        place = lower(vector.at[pair]) == found.top ? 2 * pair : place;
      }
      with_column.column = first + best * kWidth + place;
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

KDFLOW_INLINE float logit(const Bits4* side, int column) {
  const Bits pair = side[column / kWidth].at[column % kWidth / 2];
  return column % 2 == 0 ? lower(pair) : upper(pair);
}

}  // namespace

KDFLOW_KERNEL void cluster_rows(KDFLOW_PARAMETERS Parameters p) {
  Meetings& meet = *reinterpret_cast<Meetings*>(device::dynamic_shared());
  const Row row(p);
  const int thread = device::thread();
  const float exponent = p.inverse_temperature * kLogE;
  device::cluster_arrive();  // its wait says that all blocks run and can be written to

  // 1. In two halves, so that the second one arrives while the first is taken in.
  const int half = (row.num_vectors / 2 + KDFLOW_THREADS - 1) / KDFLOW_THREADS * KDFLOW_THREADS;
  const int middle = (half < row.num_vectors ? half : row.num_vectors);
  row.copy(thread, middle);
  row.copy(half + thread, row.num_vectors);
  Softmax of_student(exponent), of_teacher(exponent);
  device::wait_copies<1>();
  of_student.take_in<kOwnCE>(row.student, thread, middle);
  of_teacher.take_in<false>(row.teacher, thread, middle);
  device::wait_copies<0>();
  of_student.take_in<kOwnCE>(row.student, half + thread, row.num_vectors);
  of_teacher.take_in<false>(row.teacher, half + thread, row.num_vectors);

  meet.student.bring(of_student.statistics(row.student, row.first), exponent);
  meet.teacher.bring(of_teacher.statistics(row.teacher, row.first), exponent);
  if constexpr (kOwnCE) meet.ce.bring({of_student.found.top, of_student.total_at_1}, kLogE);
  device::cluster_wait();
  device::sync_threads();
  if (thread < 32) {
    meet.student.tell(row.rank, KDFLOW_CLUSTER, exponent);
    meet.teacher.tell(row.rank, KDFLOW_CLUSTER, exponent);
    if constexpr (kOwnCE) meet.ce.tell(row.rank, KDFLOW_CLUSTER, kLogE);
  }
  device::cluster_arrive();
  device::cluster_wait();
  const Statistics student = meet.student.take(exponent), teacher = meet.teacher.take(exponent);
  const LogProbs q_at(student, exponent), p_at(teacher, exponent);
  const LogProbs ce_at(kOwnCE ? meet.ce.take(kLogE) : student, kLogE);

  int label = -1;
  if constexpr (kHasLabels) {
    label = static_cast<int>(p.labels[row.row]) - row.first;  // of this slice
    if (thread == 0 && label >= 0 && label < p.slice) p.ce[row.row] = -ce_at.at(logit(row.student, label)) / kLogE;
  }
  if (row.rank == 0 && thread == 0) {
    p.student_entropy[row.row] = entropy(student);
    p.teacher_entropy[row.row] = entropy(teacher);
    p.agreement[row.row] = student.column == teacher.column ? 1.0F : 0.0F;
  }

  // 2.
  Sums sums;
  float gradient_sum = -1.0F;  // where it is known
  if constexpr (kSumPass) {
    for (int v = thread; v < row.num_vectors; v += KDFLOW_THREADS) {
      const Bits4 z = row.student[v], y = row.teacher[v];
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const Bits z_pair = z.at[j / 2], y_pair = y.at[j / 2];
        const float log_q = q_at.at(j % 2 == 0 ? lower(z_pair) : upper(z_pair));
        const float log_p = p_at.at(j % 2 == 0 ? lower(y_pair) : upper(y_pair));
        const Term term = Divergence::at(p.parameter, device::exp2(log_p), device::exp2(log_q), log_p, log_q);
        sums.f += term.f;
        sums.g += term.g;
      }
    }
    exchange(meet.sums, sums, kFormGradient ? KDFLOW_CLUSTER : 1, row.rank);
    gradient_sum = sums.g / Divergence::kScaleG;
  }

  // 3.
  if constexpr (kFormGradient) {
    const float scale = p.row_scale[row.row];
    const float ce_scale = kHasLabels ? scale * p.ce_weight : 0.0F;
    const float kd_scale = scale * p.kd_weight * p.inverse_temperature;
    const float g_scale = kd_scale / Divergence::kScaleG;
    const float q_scale = (kOwnCE ? 0.0F : ce_scale) - kd_scale * gradient_sum;
    Bits4* const gradient = row.place(p.gradient, p.gradient_stride);
    for (int v = thread; v < row.num_vectors; v += KDFLOW_THREADS) {
      const Bits4 z = row.student[v], y = row.teacher[v];
      float dz[kWidth];
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const Bits z_pair = z.at[j / 2], y_pair = y.at[j / 2];
        const float logit = j % 2 == 0 ? lower(z_pair) : upper(z_pair);
        const float log_q = q_at.at(logit);
        const float log_p = p_at.at(j % 2 == 0 ? lower(y_pair) : upper(y_pair));
        const float q = device::exp2(log_q);
        const Term term = Divergence::at(p.parameter, device::exp2(log_p), q, log_p, log_q);
        if constexpr (!kSumPass) sums.f += term.f;
        dz[j] = g_scale * term.g + q_scale * q;
        if constexpr (kOwnCE) dz[j] += ce_scale * device::exp2(ce_at.at(logit));
      }
      if constexpr (kHasLabels) {
        const int place = label - v * kWidth;
        if (place >= 0 && place < kWidth) {
#pragma unroll
          for (int j = 0; j < kWidth; ++j) dz[j] -= j == place ? ce_scale : 0.0F;
        }
      }
      Bits4 packed;
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) packed.at[pair] = device::narrow(dz[2 * pair], dz[2 * pair + 1]);
      gradient[v] = packed;
    }
    // The padding stays without mass.
    const int end = p.num_columns - row.first;
    if (end > 0 && end <= p.slice && end / kWidth % KDFLOW_THREADS == thread) {
      auto* const padding = reinterpret_cast<unsigned short*>(gradient);
      for (int column = end; column % kWidth != 0; ++column) {
        padding[column] = static_cast<unsigned short>(device::narrow(kLowest, kLowest));
      }
    }
    if constexpr (!kSumPass) exchange(meet.sums, sums, 1, row.rank);
  }
  if (row.rank == 0 && thread == 0) p.kd[row.row] = sums.f / Divergence::kScaleF;
}
