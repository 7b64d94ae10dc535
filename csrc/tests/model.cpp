// Explicit-state model checker of the slot protocol: every interleaving of every atomic step, of deaths, restarts,
// burials and sleeps, for small rings. It runs on the transitions of control.hpp, the ones the ring uses.
//
// Checked in every state: a payload has one writer and nobody beside him, a record read is the one that was written,
// a living owner never loses his slot. Checked where nothing can move any more: every ticket was delivered once or
// reported lost, so no wake-up is ever missed. Each planted bug must break one of these.
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <unordered_set>
#include <vector>

#include "kdflow/control.hpp"

using kdflow::Control;
using kdflow::Phase;

namespace {

enum class Bug { none, reader_word_comes_back, burial_trusts_old_news, commit_wakes_nobody, sleep_without_bit };

struct Config {
  const char* name;
  bool ticketed;  // the consumer grants tickets and gives lost ones again; else free-running
  int num_slots, num_tickets, num_producers, num_consumers, num_deaths;
  bool restarts;
};

constexpr int kMaxSlots = 2, kMaxAgents = 4, kMaxTickets = 4;

enum Pc : std::uint8_t {
  choose,
  look,
  take,
  move_cursor,
  begin,
  end,
  read_own,
  give,
  skip,
  mark_waiting,
  doze,
  asleep,
  finished,
  bury_look,
  bury_check,
  bury_swap,
  bury_entry,
  rewind_look,
  rewind_swap,
};

struct Agent {
  bool producer, alive;
  Pc pc;
  std::int8_t entry;  // in the peer table; kept after death, as the table keeps it
  std::uint8_t epoch, ticket;
  Control seen, granted;
  // burial
  std::int8_t dead_entry;
  std::uint8_t dead_epoch, slot, oldest, cursor;
  Control word;
};

struct State {
  Control control[kMaxSlots];
  std::uint8_t next_write, next_read, deaths;
  struct {
    bool taken;
    std::uint8_t epoch;
  } entries[kMaxAgents];
  // ghosts: not in shared memory, only for checking
  std::uint8_t payload[kMaxSlots], writers[kMaxSlots], readers[kMaxSlots];
  std::uint8_t granted[kMaxTickets], taken[kMaxTickets], delivered[kMaxTickets], lost[kMaxTickets];
  Agent agents[kMaxAgents];
};

class Model {
 public:
  Model(const Config& config, Bug bug) : config_(config), bug_(bug) {}

  // The first violation, or empty. num_states counts what was visited.
  std::string check(std::size_t& num_states) {
    State first;
    std::memset(static_cast<void*>(&first), 0, sizeof first);
    for (int i = 0; i < num_agents(); ++i) {
      Agent& agent = first.agents[i];
      agent.alive = true;
      agent.producer = i >= config_.num_consumers;
      agent.entry = static_cast<std::int8_t>(i);
      first.entries[i].taken = true;
    }
    for (int slot = 0; slot < config_.num_slots; ++slot) first.granted[slot] = 1;
    add(first);
    while (!frontier_.empty() && violation_.empty()) {
      const State state = frontier_.back();
      frontier_.pop_back();
      expand(state);
    }
    num_states = visited_.size();
    return violation_;
  }

 private:
  int num_agents() const { return config_.num_producers + config_.num_consumers; }
  int slot_of(int ticket) const { return ticket % config_.num_slots; }
  std::uint64_t lap_of(int ticket) const { return static_cast<std::uint64_t>(ticket / config_.num_slots); }

  // 64 bits stand for a state: with 10^7 states the odds of ever confusing two are below 10^-5.
  static std::uint64_t fingerprint(const State& state) {
    static_assert(sizeof(State) % 8 == 0);
    std::array<std::uint64_t, sizeof(State) / 8> words;
    std::memcpy(words.data(), &state, sizeof state);
    std::uint64_t hash = 0;
    for (const std::uint64_t word : words) {  // the finaliser of splitmix64, chained
      hash = (hash + word + 0x9e3779b97f4a7c15) * 0xbf58476d1ce4e5b9;
      hash = (hash ^ (hash >> 31)) * 0x94d049bb133111eb;
      hash ^= hash >> 29;
    }
    return hash;
  }

  void add(const State& state) {
    if (visited_.insert(fingerprint(state)).second) frontier_.push_back(state);
  }

  void fail(const std::string& what) {
    if (violation_.empty()) violation_ = what;
  }

  bool has_dead_entry(const State& state) const {
    for (int i = 0; i < num_agents(); ++i) {
      if (is_unburied(state, state.agents[i])) return true;
    }
    return false;
  }
  bool is_unburied(const State& state, const Agent& agent) const {
    return !agent.alive && state.entries[agent.entry].taken && state.entries[agent.entry].epoch == agent.epoch;
  }
  bool is_record_behind(const State& state) const {
    for (int slot = 0; slot < config_.num_slots; ++slot) {
      if (state.control[slot].phase() == Phase::ready && ticket_of(state, slot) < state.next_read) return true;
    }
    return false;
  }
  int ticket_of(const State& state, int slot) const {
    return static_cast<int>(state.control[slot].lap()) * config_.num_slots + slot;
  }

  void expand(const State& state) {
    bool moved = false;
    for (int i = 0; i < num_agents(); ++i) {
      const Agent& agent = state.agents[i];
      if (agent.alive) {
        moved |= step(state, i);
        if (state.deaths < config_.num_deaths && agent.pc != finished) die(state, i);
      } else if (config_.restarts && !is_unburied(state, agent)) {
        moved |= restart(state, i);
      }
    }
    if (!moved) check_end(state);
  }

  void die(State state, int i) {
    Agent& agent = state.agents[i];
    const int slot = slot_of(agent.ticket);
    if (agent.pc == end) --(agent.producer ? state.writers : state.readers)[slot];
    if (agent.pc == end && agent.producer) state.payload[slot] = 0xff;  // half-written
    agent.alive = false;
    ++state.deaths;
    add(state);
  }

  bool restart(State state, int i) {
    // A new process: it takes the first free entry, and with it perhaps the index of somebody long gone.
    for (int entry = 0; entry < num_agents(); ++entry) {
      if (state.entries[entry].taken) continue;
      state.entries[entry].taken = true;
      Agent agent;
      std::memset(static_cast<void*>(&agent), 0, sizeof agent);
      agent.producer = state.agents[i].producer;
      agent.alive = true;
      agent.entry = static_cast<std::int8_t>(entry);
      agent.epoch = state.entries[entry].epoch;
      state.agents[i] = agent;
      add(state);
      return true;
    }
    return false;
  }

  // Compare-and-swap of a control word, with the wake-up that belongs to it.
  bool exchange(State& state, int slot, Control expected, Control next, bool silent = false) {
    if (state.control[slot] != expected) return false;
    state.control[slot] = next;
    if (expected.waiting() && !next.waiting() && !silent) {
      for (int i = 0; i < num_agents(); ++i) {
        Agent& agent = state.agents[i];
        if (agent.alive && agent.pc == asleep && slot_of(agent.ticket) == slot) agent.pc = choose;
      }
    }
    return true;
  }

  bool step(const State& before, int i) {
    State state = before;
    Agent& agent = state.agents[i];
    const int slot = slot_of(agent.ticket);
    const std::uint64_t lap = lap_of(agent.ticket);
    switch (agent.pc) {
      case choose:
        return choose_ticket(before, i);
      case look:
        agent.seen = state.control[slot];
        agent.pc = agent.producer ? after_look_producer(agent, lap) : after_look_consumer(agent, lap);
        break;
      case take: {
        const Control next = agent.producer ? agent.seen.writing_by(static_cast<std::uint32_t>(agent.entry))
                                            : agent.seen.reading_by(static_cast<std::uint32_t>(agent.entry));
        if (!exchange(state, slot, agent.seen, next)) {
          agent.pc = choose;
          break;
        }
        agent.granted = next.without_waiting();
        agent.pc = config_.ticketed ? begin : move_cursor;
        if (agent.producer) {
          state.granted[agent.ticket] = 0;
          state.taken[agent.ticket] = 1;
        }
        break;
      }
      case move_cursor: {
        std::uint8_t& cursor = agent.producer ? state.next_write : state.next_read;
        if (cursor == agent.ticket) ++cursor;
        agent.pc = agent.granted == Control() ? choose : begin;
        break;
      }
      case begin: {
        std::uint8_t* mine = agent.producer ? state.writers : state.readers;
        if (state.writers[slot] != 0 || (agent.producer && state.readers[slot] != 0)) fail("payload shared");
        if (!agent.producer && state.readers[slot] != 0) fail("record read twice at once");
        ++mine[slot];
        agent.pc = end;
        break;
      }
      case end:
        --(agent.producer ? state.writers : state.readers)[slot];
        if (agent.producer) state.payload[slot] = agent.ticket;
        if (!agent.producer && state.payload[slot] != agent.ticket) fail("wrong record delivered");
        agent.pc = read_own;
        break;
      case read_own:
        agent.seen = state.control[slot];
        if (agent.seen.without_waiting() != agent.granted) fail("a living owner lost his slot");
        agent.pc = give;
        break;
      case give: {
        const Control next = agent.producer ? agent.granted.committed() : agent.granted.released();
        const bool silent = bug_ == Bug::commit_wakes_nobody && agent.producer;
        if (!exchange(state, slot, agent.seen, next, silent)) {
          agent.pc = read_own;
          break;
        }
        if (!agent.producer) {
          ++state.delivered[agent.ticket];
          if (agent.ticket + config_.num_slots < config_.num_tickets) {
            state.granted[agent.ticket + config_.num_slots] = 1;
          }
        }
        agent.granted = Control();
        agent.pc = choose;
        break;
      }
      case skip: {
        const Control next = config_.ticketed ? agent.seen.granted_again() : agent.seen.released();
        if (exchange(state, slot, agent.seen, next)) {
          if (config_.ticketed) {
            state.granted[agent.ticket] = 1;
          } else {
            ++state.lost[agent.ticket];
          }
        }
        agent.pc = choose;
        break;
      }
      case mark_waiting:
        agent.pc = doze;
        if (agent.seen.waiting() || bug_ == Bug::sleep_without_bit) break;
        if (!exchange(state, slot, agent.seen, agent.seen.with_waiting())) agent.pc = choose;
        agent.seen = agent.seen.with_waiting();
        break;
      case doze:  // the kernel's own comparison
        agent.pc = state.control[slot].futex_value() == agent.seen.futex_value() ? asleep : choose;
        break;
      case asleep:
        return start_burial(before, i);
      case finished:
        return false;
      default:
        return bury(before, i);
    }
    add(state);
    return true;
  }

  bool choose_ticket(const State& before, int i) {
    State state = before;
    Agent& agent = state.agents[i];
    agent.granted = agent.seen = Control();
    agent.pc = look;
    if (!config_.ticketed) {
      agent.ticket = agent.producer ? state.next_write : state.next_read;
      if (agent.ticket >= config_.num_tickets) {
        agent.ticket = 0;
        agent.pc = agent.producer ? finished : choose;
        if (!agent.producer) return start_burial(before, i);
      }
      add(state);
      return true;
    }
    if (agent.producer) {
      bool any = false;
      for (int ticket = 0; ticket < config_.num_tickets; ++ticket) {
        if (state.granted[ticket] == 0) continue;
        agent.ticket = static_cast<std::uint8_t>(ticket);
        add(state);
        any = true;
      }
      return any;
    }
    for (int ticket = 0; ticket < config_.num_tickets; ++ticket) {
      if (state.delivered[ticket] != 0) continue;
      agent.ticket = static_cast<std::uint8_t>(ticket);
      add(state);
      return true;
    }
    return false;
  }

  Pc after_look_producer(Agent& agent, std::uint64_t lap) const {
    if (agent.seen.is(Phase::free, lap)) return take;
    if (agent.seen.lap() < lap) return mark_waiting;
    return config_.ticketed ? choose : move_cursor;
  }

  Pc after_look_consumer(Agent& agent, std::uint64_t lap) const {
    if (agent.seen.is(Phase::ready, lap)) return take;
    if (agent.seen.is(Phase::abandoned, lap)) return skip;
    if (!config_.ticketed && (agent.seen.lap() > lap || agent.seen.is(Phase::reading, lap))) return move_cursor;
    return agent.seen.lap() > lap ? choose : mark_waiting;
  }

  // A tick of a sleeper. Only offered where it has something to do: otherwise it would hide missed wake-ups.
  bool start_burial(State state, int i) {
    Agent& agent = state.agents[i];
    if (!config_.ticketed && !agent.producer && agent.pc == asleep && state.deaths > 0 &&
        agent.ticket > state.next_read) {  // the cursor went back while it slept
      agent.pc = choose;
      add(state);
      return true;
    }
    if (!has_dead_entry(state) && !is_record_behind(state)) return false;
    agent.slot = 0;
    agent.cursor = agent.oldest = state.next_read;
    agent.pc = rewind_look;
    for (int other = 0; other < num_agents(); ++other) {
      if (!is_unburied(state, state.agents[other])) continue;
      agent.dead_entry = state.agents[other].entry;
      agent.dead_epoch = state.agents[other].epoch;
      agent.pc = bury_look;
      break;
    }
    add(state);
    return true;
  }

  bool bury(State state, int i) {
    Agent& agent = state.agents[i];
    const auto& entry = state.entries[agent.dead_entry];
    const auto next_slot = [&](Pc again, Pc after) {
      agent.word = Control();
      if (++agent.slot < config_.num_slots) {
        agent.pc = again;
      } else {
        agent.slot = 0;
        agent.pc = after;
      }
    };
    switch (agent.pc) {
      case bury_look:
        agent.word = state.control[agent.slot];
        agent.pc = bury_check;
        if (!agent.word.owned_by(static_cast<std::uint32_t>(agent.dead_entry))) next_slot(bury_look, bury_entry);
        break;
      case bury_check:
        agent.pc = bury_swap;
        if (bug_ == Bug::burial_trusts_old_news) break;
        if (!entry.taken || entry.epoch != agent.dead_epoch) next_slot(bury_look, bury_entry);
        break;
      case bury_swap: {
        Control next = agent.word.orphaned();
        if (bug_ == Bug::reader_word_comes_back && agent.word.phase() == Phase::reading) {
          next = agent.word.committed();
        }
        if (exchange(state, agent.slot, agent.word, next)) {
          next_slot(bury_look, bury_entry);
        } else {
          agent.pc = bury_look;
        }
        break;
      }
      case bury_entry:
        if (entry.taken && entry.epoch == agent.dead_epoch) {
          state.entries[agent.dead_entry].taken = false;
          ++state.entries[agent.dead_entry].epoch;
        }
        agent.dead_entry = 0;
        agent.dead_epoch = 0;
        agent.pc = rewind_look;
        break;
      case rewind_look:
        if (state.control[agent.slot].phase() == Phase::ready && ticket_of(state, agent.slot) < agent.oldest) {
          agent.oldest = static_cast<std::uint8_t>(ticket_of(state, agent.slot));
        }
        next_slot(rewind_look, rewind_swap);
        break;
      default:  // rewind_swap
        if (!config_.ticketed && agent.oldest < agent.cursor && state.next_read == agent.cursor) {
          state.next_read = agent.oldest;
        }
        agent.oldest = agent.cursor = 0;
        agent.pc = choose;
        break;
    }
    add(state);
    return true;
  }

  void check_end(const State& state) {
    bool any_producer = false, any_consumer = false;
    for (int i = 0; i < num_agents(); ++i) {
      (state.agents[i].producer ? any_producer : any_consumer) |= state.agents[i].alive;
    }
    for (int ticket = 0; ticket < config_.num_tickets; ++ticket) {
      if (state.delivered[ticket] + state.lost[ticket] > 1) fail("ticket delivered twice");
      const bool due = any_consumer && any_producer;
      if (due && state.delivered[ticket] + state.lost[ticket] == 0) fail("everybody sleeps, a ticket is open");
      if (any_consumer && !config_.ticketed && state.taken[ticket] != 0 &&
          state.delivered[ticket] + state.lost[ticket] == 0) {
        fail("everybody sleeps, a record is lost in silence");
      }
      if (config_.num_deaths == 0 && state.lost[ticket] != 0) fail("a record was lost, and nobody died");
    }
  }

  const Config config_;
  const Bug bug_;
  std::unordered_set<std::uint64_t> visited_;
  std::vector<State> frontier_;
  std::string violation_;
};

int failures = 0;

void run(const Config& config, Bug bug, const char* bug_name, bool must_fail) {
  std::size_t num_states = 0;
  const std::string violation = Model(config, bug).check(num_states);
  const bool as_expected = violation.empty() != must_fail;
  std::printf("%-34s %-26s %9zu states  %s%s\n", config.name, bug_name, num_states,
              violation.empty() ? "no violation" : violation.c_str(), as_expected ? "" : "   <-- UNEXPECTED");
  std::fflush(stdout);
  failures += as_expected ? 0 : 1;
}

}  // namespace

int main() {
  const Config free_2p1c{"free-running 2 producers", false, 2, 3, 2, 1, 1, true};
  const Config free_1p2c{"free-running 2 consumers", false, 1, 2, 1, 2, 1, true};
  const Config free_deaths{"free-running 1+1, 3 deaths", false, 2, 4, 1, 1, 3, true};
  const Config two_readers_die{"2 consumers, 2 deaths", false, 1, 2, 1, 2, 2, true};
  const Config ticketed{"ticketed 2 producers", true, 2, 3, 2, 1, 1, true};
  const Config ticketed_deaths{"ticketed 1+1, 3 deaths", true, 2, 3, 1, 1, 3, true};
  for (const Config& config : {free_2p1c, free_1p2c, free_deaths, two_readers_die, ticketed, ticketed_deaths}) {
    run(config, Bug::none, "-", false);
  }
  run(two_readers_die, Bug::reader_word_comes_back, "reader_word_comes_back", true);
  run(two_readers_die, Bug::burial_trusts_old_news, "burial_trusts_old_news", true);
  run(free_1p2c, Bug::commit_wakes_nobody, "commit_wakes_nobody", true);
  run(free_1p2c, Bug::sleep_without_bit, "sleep_without_bit", true);
  return failures == 0 ? 0 : 1;
}
