// The kernel of cluster_rows.cu on a host (see host_device.hpp), behind those calls of the driver that start it.
#include KDFLOW_SOURCE

#include <string>

namespace {

constexpr std::size_t kStackBytes = 48 << 10;
constexpr int kNumFibers = KDFLOW_CLUSTER * KDFLOW_THREADS;

const Parameters* given = nullptr;

void run_fiber() {
  cluster_rows(*given);
  device::self().done = true;
  device::pause();
}

device::Barrier barrier_of(int fibers) {
  device::Barrier made;
  made.expected = fibers;
  return made;
}

void start(device::Cluster& cluster, int index, std::size_t shared_bytes) {
  cluster.index = index;
  cluster.barrier = barrier_of(kNumFibers);
  for (auto& block : cluster.blocks) {
    block.shared.assign(shared_bytes / sizeof(Bits4), {~0U, ~0U, ~0U, ~0U});
    block.barrier = barrier_of(KDFLOW_THREADS);
    block.warps = std::vector<device::Warp>(kWarps);
    for (auto& warp : block.warps) warp.barrier = barrier_of(32);
  }
  int number = 0;
  std::uint64_t hurry = 0;
  for (auto& fiber : cluster.fibers) {
    std::unique_ptr<char[]> stack = std::move(fiber.stack);
    fiber = {};
    fiber.stack = stack ? std::move(stack) : std::make_unique_for_overwrite<char[]>(kStackBytes);
    fiber.rank = number / KDFLOW_THREADS;
    fiber.thread = number++ % KDFLOW_THREADS;
    if (fiber.thread % 32 == 0) hurry = cluster.random();
    fiber.hurry = hurry;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    makecontext(&fiber.context, run_fiber, 0);
    cluster.ready.push_back(&fiber);
  }
}

// Of some that are ready the one that is most in a hurry: warps get far ahead of one another.
device::Fiber* choose(device::Cluster& cluster) {
  auto& ready = cluster.ready;
  std::size_t best = cluster.random() % ready.size();
  for (int tries = 0; tries < 8; ++tries) {
    const std::size_t other = cluster.random() % ready.size();
    if (ready[other]->hurry > ready[best]->hurry) best = other;
  }
  std::swap(ready[best], ready.back());
  device::Fiber* const chosen = ready.back();
  ready.pop_back();
  return chosen;
}

// The blocks, a cluster after another; null, or what is wrong.
const char* run(int num_blocks, std::size_t shared_bytes) {
  device::Cluster cluster;
  cluster.random.seed(static_cast<std::uint64_t>(num_blocks));
  cluster.blocks.resize(KDFLOW_CLUSTER);
  cluster.fibers.resize(kNumFibers);
  device::cluster = &cluster;
  for (int index = 0; index < num_blocks / KDFLOW_CLUSTER; ++index) {
    start(cluster, index, shared_bytes);
    int left = kNumFibers;
    while (left > 0) {
      if (cluster.ready.empty()) {
        return cluster.misused ? "a thread used the cluster's barrier wrongly" : "blocks wait for one another for ever";
      }
      cluster.running = choose(cluster);
      ++cluster.clock;
      swapcontext(&cluster.scheduler, &cluster.running->context);
      if (cluster.running->done) {
        --left;
        if (cluster.running->arrived_in >= 0 || !cluster.running->stores.empty()) {
          return "a thread ended with a barrier or a store under way";
        }
      }
    }
  }
  return nullptr;
}

constexpr int kSuccess = 0, kInvalidValue = 1, kNotFound = 500, kLaunchFailed = 719;
constexpr int kMostSharedBytes = 227 * 1024;
// CUfunction_attribute
constexpr int kNumRegs = 4, kMaxDynamicSharedBytes = 8, kCarveout = 9, kPolicy = 15;

int shared_limit = 48 * 1024;
std::string wrong;

}  // namespace

// What nvrtc.py calls of the driver.
extern "C" {

int cuModuleLoadData(void** module, const void*) {
  *module = &shared_limit;
  return kSuccess;
}

int cuModuleGetFunction(void** function, void*, const char* name) {
  *function = &shared_limit;
  return std::strcmp(name, "cluster_rows") == 0 ? kSuccess : kNotFound;
}

int cuFuncSetAttribute(void*, int attribute, int value) {
  if (attribute == kCarveout) return value == 100 ? kSuccess : kInvalidValue;
  if (attribute == kPolicy) return value >= 0 && value <= 2 ? kSuccess : kInvalidValue;
  if (attribute != kMaxDynamicSharedBytes || value > kMostSharedBytes) return kInvalidValue;
  shared_limit = value;
  return kSuccess;
}

int cuFuncGetAttribute(int* value, int attribute, void*) {
  *value = attribute == kNumRegs ? 64 : 0;
  return kSuccess;
}

int cuOccupancyMaxActiveClusters(int* clusters, void*, const unsigned* config) {
  *clusters = 1;
  return config[0] % KDFLOW_CLUSTER == 0 && config[3] == KDFLOW_THREADS ? kSuccess : kInvalidValue;
}

int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned threads_y,
                   unsigned threads_z, unsigned shared_bytes, void* stream, void** parameters, void** extra) {
  const bool is_line = y == 1 && z == 1 && threads_y == 1 && threads_z == 1;
  if (function != &shared_limit || !is_line || stream != nullptr || extra != nullptr) return kInvalidValue;
  if (x == 0 || x % KDFLOW_CLUSTER != 0 || threads != KDFLOW_THREADS) return kInvalidValue;
  if (static_cast<int>(shared_bytes) > shared_limit) return kInvalidValue;
  given = static_cast<const Parameters*>(parameters[0]);
  const char* const found = run(static_cast<int>(x), shared_bytes);
  wrong = found == nullptr ? "" : found;
  return found == nullptr ? kSuccess : kLaunchFailed;
}

int cuGetErrorString(int error, const char** text) {
  *text = error == kLaunchFailed ? wrong.c_str() : error == kNotFound ? "not found" : "invalid value";
  return kSuccess;
}

}  // extern "C"
