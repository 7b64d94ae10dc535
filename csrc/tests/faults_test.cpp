// Processes that die: at every fault point of the protocol, and in random schedules of kills and restarts.
//
//   faults_test [name] [schedules] [first seed]
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <random>
#include <thread>
#include <vector>

#include "kdflow/ring.hpp"
#include "support.hpp"

using namespace support;

namespace {

constexpr std::uint64_t kMaxTickets = 32;
int num_schedules = 500;  // of each mode
std::uint32_t first_seed = 0;

// What the children did, in memory that survives them.
struct Log {
  std::array<std::atomic<int>, kMaxTickets> read, lost;
  std::atomic<bool> done;
};

struct Plan {
  const char* point = nullptr;
  int countdown = 0;
  int kill_after_us = -1;  // from outside, anywhere
};

constexpr std::array kProducerPoints{"peer_claimed", "slot_taken", "reserved",      "record_written", "committed",
                                     "waiting",      "received",   "slot_received", "releasing",      "released"};
constexpr std::array kConsumerPoints{"peer_claimed", "slot_received", "received",     "releasing",
                                     "released",     "waiting",       "peer_orphaned"};
// A consumer of tickets is also a sender of requests, so it may die as one.
constexpr std::array kTicketedConsumerPoints{"peer_claimed", "received",   "releasing", "released",      "waiting",
                                             "reserved",     "slot_taken", "committed", "record_written"};

class Schedule {
 public:
  Schedule(bool ticketed, std::uint64_t num_slots, std::uint64_t num_tickets)
      : ticketed_(ticketed),
        num_tickets_(num_tickets),
        data_(make_ring(num_slots, 64)),
        requests_(make_ring(4, 64, RingKind::request)),
        log_(static_cast<Log*>(
            ::mmap(nullptr, sizeof(Log), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0))) {
    CHECK(log_ != MAP_FAILED);
    new (log_) Log{};
  }
  ~Schedule() { ::munmap(log_, sizeof(Log)); }

  // plans[0] is the consumer's, the others the producers'; next_plan(is_producer) is that of a restarted child.
  void run(const std::vector<Plan>& plans, const std::function<Plan(bool)>& next_plan) {
    std::vector<Child> children(plans.size());
    for (std::size_t i = 0; i < plans.size(); ++i) children[i] = start(i, plans[i]);
    const Clock::time_point deadline = Clock::now() + 60s;
    std::size_t num_running = children.size();
    while (num_running > 0) {
      CHECK(Clock::now() < deadline);  // nobody hangs
      for (std::size_t i = 0; i < children.size(); ++i) {
        Child& child = children[i];
        if (child.pid == 0) continue;
        if (child.kill_at && Clock::now() >= *child.kill_at) {
          child.kill_at.reset();
          ::kill(child.pid, SIGKILL);
        }
        int status = 0;
        if (::waitpid(child.pid, &status, WNOHANG) == 0) continue;
        if (WIFSIGNALED(status)) {
          CHECK(WTERMSIG(status) == SIGKILL);
          ++(i == 0 ? consumer_deaths_ : producer_deaths_);
          child = start(i, next_plan(i > 0));
        } else {
          CHECK(WEXITSTATUS(status) == 0);
          child.pid = 0;
          --num_running;
        }
      }
      std::this_thread::sleep_for(100us);
    }
    check_result();
  }

  int deaths() const { return consumer_deaths_ + producer_deaths_; }

 private:
  struct Child {
    pid_t pid = 0;
    std::optional<Clock::time_point> kill_at{};
  };

  Child start(std::size_t index, const Plan& plan) {
    Child child;
    child.pid = spawn([&] {
      fault_plan = {.point = plan.point, .countdown = plan.countdown};
      if (index == 0) {
        ticketed_ ? consume_tickets() : consume_in_order();
        log_->done = true;
      } else {
        ticketed_ ? serve_requests() : produce();
      }
    });
    if (plan.kill_after_us >= 0) child.kill_at = Clock::now() + std::chrono::microseconds(plan.kill_after_us);
    return child;
  }

  void check_result() const {
    int num_lost = 0;
    for (std::uint64_t ticket = 0; ticket < num_tickets_; ++ticket) {
      const int read = log_->read[ticket], lost = log_->lost[ticket];
      CHECK(read + lost >= 1);                       // delivered, or reported lost
      CHECK(lost == 0 || (lost == 1 && read == 0));  // reported once, and truly
      CHECK(read <= 1 + consumer_deaths_);           // again only to a consumer whose predecessor died over it
      num_lost += lost;
    }
    CHECK(num_lost <= producer_deaths_);
    CHECK(!ticketed_ || num_lost == 0);
  }

  // --- free-running ---
  void produce() const {
    const Ring ring = join(data_, Role::producer);
    while (!log_->done) {
      try {
        Lease lease = ring.reserve(std::nullopt, within(20s));
        if (lease.ticket() >= num_tickets_) {
          lease.abort("the end");
          return;
        }
        fill(lease, 1 + lease.ticket() % 64);
        lease.commit();
      } catch (const PeerDied&) {  // the consumer will be restarted
      }
    }
  }

  bool all_accounted() const {
    for (std::uint64_t ticket = 0; ticket < num_tickets_; ++ticket) {
      if (log_->read[ticket] + log_->lost[ticket] == 0) return false;
    }
    return true;
  }

  void consume_in_order() const {
    const Ring ring = join(data_, Role::consumer);
    while (!all_accounted()) {
      try {
        Lease lease = ring.receive(std::nullopt, within(20s));
        CHECK(intact(lease) && lease.ticket() < num_tickets_);
        ++log_->read[lease.ticket()];
        lease.release();
      } catch (const SlotAborted& error) {
        CHECK(error.ticket.value() >= num_tickets_);
      } catch (const PeerDied& error) {
        if (error.ticket && *error.ticket < num_tickets_) ++log_->lost[*error.ticket];
      }
    }
  }

  // --- ticketed: requests one way, records the other ---
  void serve_requests() const {
    const Ring requests = join(requests_, Role::consumer);
    const Ring records = join(data_, Role::producer);
    while (!log_->done) {
      try {
        Lease request = requests.receive(std::nullopt, within(20s));
        std::uint64_t ticket = 0;
        std::memcpy(&ticket, request.data(), sizeof ticket);
        CHECK(ticket < num_tickets_);
        Lease record = records.reserve(ticket, within(20s));
        request.release();  // from here on the slot tells of our death
        fill(record, 1 + ticket % 64);
        record.commit();
      } catch (const PeerDied&) {
      } catch (const RingTimeout&) {
        throw;
      } catch (const TransportError&) {  // a request that was sent twice
      }
    }
  }

  void send(const Ring& requests, std::uint64_t ticket) const {
    while (true) {
      try {
        Lease lease = requests.reserve(std::nullopt, within(20s));
        const std::int64_t nbytes = sizeof ticket;
        lease.shape(1, 8, {&nbytes, 1});
        std::memcpy(lease.data(), &ticket, sizeof ticket);
        lease.commit();
        return;
      } catch (const PeerDied&) {
      }
    }
  }

  void consume_tickets() const {
    const Ring records = join(data_, Role::consumer);
    const Ring requests = join(requests_, Role::producer);
    const Slots& slots = records.slots();
    std::array<bool, kMaxTickets> requested{};
    for (std::uint64_t ticket = 0; ticket < num_tickets_;) {
      if (slots.load(slots.slot_of(ticket)).lap() > slots.lap_of(ticket)) {  // released by our predecessor
        ++ticket;
        continue;
      }
      for (std::uint64_t next = ticket; next < std::min(ticket + slots.count(), num_tickets_); ++next) {
        if (requested[next] || !records.is_free(next)) continue;
        requested[next] = true;
        send(requests, next);
      }
      try {
        Lease lease = records.receive(ticket, within(20s));
        CHECK(intact(lease));
        ++log_->read[ticket];
        lease.release();
      } catch (const PeerDied&) {
        if (slots.load(slots.slot_of(ticket)).phase() == Phase::abandoned) {
          records.reclaim(ticket);
          requested[ticket] = false;
        } else {  // nobody has it yet: its request waits for the next worker
          records.wait_for_peer(within(20s));
        }
      }
    }
  }

  bool ticketed_;
  std::uint64_t num_tickets_;
  Ring data_, requests_;
  Log* log_;
  int consumer_deaths_ = 0, producer_deaths_ = 0;
};

void run_random(bool ticketed) {
  int deaths = 0;
  for (int i = 0; i < num_schedules; ++i) {
    const std::uint32_t seed = first_seed + static_cast<std::uint32_t>(i);
    std::mt19937 random(seed);
    const auto draw = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); };
    int deaths_left = draw(1, 6);
    const auto plan = [&](bool producer) {
      if (deaths_left-- <= 0) return Plan{};
      // Random instants for producers only: a consumer killed between the ring's books and ours has no right answer.
      if (producer && draw(0, 2) == 0) return Plan{.kill_after_us = draw(0, 4000)};
      const auto pick = [&](const auto& points) {
        return points[static_cast<std::size_t>(draw(0, static_cast<int>(points.size()) - 1))];
      };
      const char* point = producer   ? pick(kProducerPoints)
                          : ticketed ? pick(kTicketedConsumerPoints)
                                     : pick(kConsumerPoints);
      return Plan{.point = point, .countdown = draw(1, 8)};
    };
    Schedule schedule(ticketed, static_cast<std::uint64_t>(draw(1, 4)), static_cast<std::uint64_t>(draw(8, 24)));
    std::vector<Plan> plans;
    for (int child = 0, count = 1 + draw(1, 3); child < count; ++child) plans.push_back(plan(child > 0));
    std::snprintf(check::context, sizeof check::context, "(seed %u)", seed);
    schedule.run(plans, plan);
    deaths += schedule.deaths();
  }
  std::printf("  %d schedules, %d deaths\n", num_schedules, deaths);
  CHECK(deaths > num_schedules / 2);
}

}  // namespace

TEST(death_at_every_point_of_a_producer) {
  for (const bool ticketed : {false, true}) {
    for (const char* point : kProducerPoints) {
      for (const int countdown : {1, 2, 5}) {
        Schedule(ticketed, 2, 12).run({{}, {.point = point, .countdown = countdown}}, [](bool) { return Plan{}; });
      }
    }
  }
}

TEST(death_at_every_point_of_a_consumer) {
  for (const char* point : kConsumerPoints) {
    Schedule(false, 2, 12).run({{.point = point, .countdown = 2}, {}}, [](bool) { return Plan{}; });
  }
  for (const char* point : kTicketedConsumerPoints) {
    Schedule(true, 2, 12).run({{.point = point, .countdown = 2}, {}}, [](bool) { return Plan{}; });
  }
}

TEST(dead_consumer_is_noticed_by_a_waiting_producer) {
  const Ring ring = make_ring(1);
  const Ring producer = join(ring, Role::producer, {});  // at the tick users get
  const pid_t pid = spawn([&] {
    const Ring consumer = join(ring, Role::consumer);
    const Lease held = consumer.receive(0, within(10s));
    ::pause();
  });
  write_one(producer, 0);
  std::thread killer([&] {
    std::this_thread::sleep_for(20ms);
    ::kill(pid, SIGKILL);
  });
  CHECK_THROWS(PeerDied, producer.reserve(1, within(10s)));
  killer.join();
  join_child(pid);
}

TEST(stopped_writer_is_not_dead) {
  const Ring ring = make_ring(1);
  const Ring consumer = join(ring, Role::consumer);
  const pid_t pid = spawn([&] {
    const Ring producer = join(ring, Role::producer);
    Lease lease = producer.reserve(0, within(1s));
    ::raise(SIGSTOP);
    fill(lease, 10);
    lease.commit();
  });
  int status = 0;
  ::waitpid(pid, &status, WUNTRACED);
  CHECK_THROWS(RingTimeout, consumer.receive(0, within(30ms)));
  CHECK_THROWS(TransportError, consumer.reclaim(0));  // its writer may still write
  ::kill(pid, SIGCONT);
  CHECK(read_one(consumer, 0) == 0);
  join_child(pid);
}

TEST(writer_whose_first_thread_has_ended_is_not_dead) {  // though /proc calls it a zombie
  const Ring ring = make_ring(1);
  const Ring consumer = join(ring, Role::consumer);
  int pipe[2];
  CHECK(::pipe(pipe) == 0);
  const pid_t pid = spawn([&] {
    const Ring producer = join(ring, Role::producer);
    Lease lease = producer.reserve(0, within(1s));
    std::thread([&] {
      char go;
      CHECK(::read(pipe[0], &go, 1) == 1);
      fill(lease, 10);
      lease.commit();
      std::_Exit(0);
    }).detach();
    ::syscall(SYS_exit, 0);
  });
  while (process_stat(pid).value_or(ProcessStat{}).state != 'Z') std::this_thread::sleep_for(1ms);
  CHECK_THROWS(RingTimeout, consumer.receive(0, within(30ms)));
  CHECK(::write(pipe[1], "x", 1) == 1);
  CHECK(read_one(consumer, 0) == 0);
  CHECK(join_child(pid) == 0);
}

TEST(forked_child_is_no_peer) {
  const Ring ring = make_ring(2);
  const Ring consumer = join(ring, Role::consumer);
  const Ring producer = join(ring, Role::producer);
  Lease lease = producer.reserve(0, within(1s));
  fill(lease, 10);
  const pid_t pid = spawn([&] {
    CHECK_THROWS(TransportError, lease.commit());
    CHECK_THROWS(TransportError, producer.reserve(1, within(0s)));
    CHECK_THROWS(TransportError, consumer.receive(0, within(0s)));
    Ring(producer).close();
    Lease(std::move(lease));  // dropped, and not given back for the parent
    write_one(join(ring, Role::producer), 1);
  });
  CHECK(join_child(pid) == 0);
  lease.commit();
  CHECK(read_one(consumer, 0) == 0 && read_one(consumer, 1) == 1);
}

TEST(random_schedules_in_order) { run_random(false); }
TEST(random_schedules_ticketed) { run_random(true); }

int main(int argc, char** argv) {
  if (argc > 2) num_schedules = std::atoi(argv[2]);
  if (argc > 3) first_seed = static_cast<std::uint32_t>(std::atoi(argv[3]));
  return check::run(argc, argv);
}
