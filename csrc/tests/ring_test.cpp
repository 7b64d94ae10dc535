// The ring inside one process: states, errors, order, threads over one mapping. Also runs under TSan.
#include "kdflow/ring.hpp"

#include <poll.h>

#include <atomic>
#include <thread>
#include <vector>

#include "kdflow/notifier.hpp"
#include "support.hpp"

using namespace support;

namespace {

std::string message_of(const std::function<void()>& body) {
  try {
    body();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

bool contains(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

}  // namespace

TEST(crc32c_has_the_published_check_value) {  // RFC 3720, B.4
  CHECK(crc32c("123456789", 9) == 0xe3069283);
  const auto* digits = reinterpret_cast<const unsigned char*>("123456789");
  CHECK(~detail::crc32c_portable(~0u, digits, 9) == 0xe3069283);
  CHECK(crc32c("", 0) == 0);
}

TEST(control_word_keeps_its_fields_apart) {
  const Control start(0);
  CHECK(start.is(Phase::free, 0) && !start.waiting());
  const Control written = start.with_waiting().writing_by(200);
  CHECK(written.is(Phase::writing, 0) && written.owner() == 200 && written.waiting() && written.owned_by(200));
  CHECK(written.committed().is(Phase::ready, 0) && !written.committed().waiting());
  Control lap = start;
  for (std::uint64_t i = 0; i < 1000; ++i) {
    CHECK(lap.lap() == i && lap.attempt() == 0);
    lap = lap.writing_by(255).committed().reading_by(0).released();
  }
  Control again = lap;
  for (std::uint64_t i = 0; i < Control::kMaxAttempt; ++i) again = again.writing_by(7).abandoned().granted_again();
  CHECK(again.attempt() == Control::kMaxAttempt && again.lap() == 1000 && again.phase() == Phase::free);
  CHECK(lap.reading_by(3).orphaned().generation() > lap.reading_by(3).generation());
}

TEST(records_go_round_in_both_modes) {
  for (const bool ticketed : {true, false}) {
    for (const bool checksum : {true, false}) {
      const Ring ring = make_ring(4, 256, RingKind::data, checksum);
      const Ring producer = join(ring, Role::producer), consumer = join(ring, Role::consumer);
      for (std::uint64_t ticket = 0; ticket < 50; ++ticket) {
        const Ring::Ticket wanted = ticketed ? Ring::Ticket(ticket) : std::nullopt;
        CHECK(consumer.is_free(ticket));
        write_one(producer, wanted, ticket * 5);
        CHECK(!consumer.is_free(ticket) && consumer.stats().depth == 1);
        CHECK(read_one(consumer, wanted) == ticket);
      }
      CHECK(consumer.stats().producers.records == 50 && consumer.stats().consumers.records == 50);
    }
  }
}

TEST(put_hands_over_what_it_is_given) {
  std::vector<std::byte> source(kPageBytes + 7);
  for (std::uint64_t i = 0; i < source.size(); ++i) source[i] = pattern(0, i);
  for (const std::uint64_t slot_bytes : {std::uint64_t{kPageBytes + 7}, last_level_cache_bytes()}) {
    const Ring ring = make_ring(1, slot_bytes, RingKind::data, /*checksum=*/true);
    CHECK(ring.slots().exceeds_cache() == (slot_bytes > kPageBytes + 7));
    const Ring producer = join(ring, Role::producer), consumer = join(ring, Role::consumer);
    Record record{};
    const auto extent = static_cast<std::int64_t>(source.size());
    producer.member()->shape(record, "put", 0, 1, 8, {&extent, 1});
    record.tag = 5;
    producer.put(0, record, source.data(), within(1s));
    const Lease lease = consumer.receive(0, within(1s));
    CHECK(intact(lease) && lease.record.tag == 5 && lease.record.nbytes == source.size());
    CHECK_THROWS(RingTimeout, producer.put(1, record, source.data(), within(1ms)));
  }
}

TEST(tickets_finish_in_any_order) {
  const Ring ring = make_ring(4);
  const Ring producer = join(ring, Role::producer), consumer = join(ring, Role::consumer);
  for (const std::uint64_t ticket : {2u, 0u, 3u, 1u}) write_one(producer, ticket);
  for (const std::uint64_t ticket : {3u, 2u, 1u, 0u}) CHECK(read_one(consumer, ticket) == ticket);
  CHECK(consumer.is_free(4) && consumer.is_free(7) && !consumer.is_free(8));
}

TEST(record_of_exactly_slot_bytes_and_one_more) {
  const Ring ring = make_ring(2, 100);
  const Ring producer = join(ring, Role::producer), consumer = join(ring, Role::consumer);
  write_one(producer, 0, 100);
  read_one(consumer, 0);
  Lease lease = producer.reserve(1, within(0s));
  const std::int64_t too_many = 101, negative = -1, huge = INT64_MAX;
  CHECK_THROWS(std::invalid_argument, lease.shape(1, 8, {&too_many, 1}));
  CHECK_THROWS(std::invalid_argument, lease.shape(1, 8, {&negative, 1}));
  CHECK_THROWS(std::invalid_argument, lease.shape(2, 64, {&huge, 1}));
  CHECK_THROWS(std::invalid_argument, lease.commit());
  const std::int64_t empty[] = {0, huge};
  lease.shape(4, 16, empty);
  lease.commit();
  CHECK(consumer.receive(1, within(0s)).record.nbytes == 0);
}

TEST(misuse_is_named) {
  const Ring ring = make_ring(2);
  CHECK_THROWS(TransportError, ring.receive(0, within(0s)));
  const Ring producer = join(ring, Role::producer), consumer = join(ring, Role::consumer);
  CHECK_THROWS(TransportError, join(ring, Role::consumer));
  CHECK_THROWS(TransportError, producer.receive(0, within(0s)));
  CHECK_THROWS(TransportError, consumer.reserve(0, within(0s)));
  CHECK_THROWS(std::invalid_argument, producer.reserve(UINT64_MAX, within(0s)));
  CHECK_THROWS(std::invalid_argument, make_ring(0));
  CHECK_THROWS(std::invalid_argument, make_ring(1, 0));
  write_one(producer, 0);
  CHECK(contains(message_of([&] { write_one(producer, 0); }), "test: reserve of ticket 0: slot 0 is ready"));
  read_one(consumer, 0);
  CHECK(contains(message_of([&] { read_one(consumer, 0); }), "received before"));
  CHECK_THROWS(TransportError, consumer.reclaim(0));
  Lease lease = producer.reserve(1, within(0s));
  fill(lease, 1);
  lease.commit();
  CHECK_THROWS(TransportError, lease.commit());
  CHECK_THROWS(TransportError, lease.abort("late"));
}

TEST(waits_end_in_timeouts_that_name_everything) {
  const Ring ring = make_ring(2);
  const Ring producer = join(ring, Role::producer), consumer = join(ring, Role::consumer);
  const std::string pid = std::to_string(::getpid());
  const std::string receive = message_of([&] { static_cast<void>(consumer.receive(1, within(5ms))); });
  CHECK(receive ==
        "test: receive of ticket 1 timed out after 0.005 s: slot 1 is free for ticket 1; "
        "alive as producer: pid " +
            pid);
  write_one(producer, 0);
  const std::string reserve = message_of([&] { static_cast<void>(producer.reserve(2, within(5ms))); });
  CHECK(reserve ==
        "test: reserve of ticket 2 timed out after 0.005 s: slot 0 is ready for ticket 0; "
        "alive as consumer: pid " +
            pid);
  CHECK(consumer.stats().consumers.waits == 1 && consumer.stats().producers.waits == 1);
}

TEST(aborted_slot_carries_its_reason_and_can_be_given_again) {
  const Ring ring = make_ring(2);
  const Ring producer = join(ring, Role::producer), consumer = join(ring, Role::consumer);
  producer.reserve(0, within(0s)).abort("RuntimeError: out of memory");
  CHECK(contains(message_of([&] { read_one(consumer, 0); }), "gave it up: RuntimeError: out of memory"));
  const std::uint64_t before = ring.slots().load(0).generation();
  consumer.reclaim(0);
  consumer.reclaim(0);
  CHECK(ring.slots().load(0).generation() > before);
  write_one(producer, 0);
  read_one(consumer, 0);
  static_cast<void>(producer.reserve(1, within(0s)));  // dropped
  CHECK_THROWS(SlotAborted, consumer.receive(1, within(0s)));
}

TEST(free_running_loss_is_reported_once) {
  const Ring ring = make_ring(2);
  const Ring producer = join(ring, Role::producer), consumer = join(ring, Role::consumer);
  producer.reserve(std::nullopt, within(0s)).abort("no");
  write_one(producer, std::nullopt);
  CHECK_THROWS(SlotAborted, consumer.receive(std::nullopt, within(0s)));
  CHECK(read_one(consumer, std::nullopt) == 1 && consumer.stats().lost == 1);
}

TEST(late_commit_of_a_revoked_slot_is_void) {
  const Ring ring = make_ring(1);
  Ring zombie = join(ring, Role::producer);
  const Ring other = join(ring, Role::producer), consumer = join(ring, Role::consumer);
  Lease late = zombie.reserve(0, within(0s));
  fill(late, 10);
  zombie.close();
  CHECK_THROWS(TransportError, late.commit());
  CHECK_THROWS(SlotAborted, consumer.receive(0, within(0s)));
  consumer.reclaim(0);
  write_one(other, 0, 20);
  CHECK_THROWS(TransportError, late.commit());
  CHECK(consumer.receive(0, within(0s)).record.nbytes == 20);
}

TEST(unreadable_record_in_order_is_lost_and_the_ring_goes_on) {
  const Ring ring = make_ring(2, 64, RingKind::data, /*checksum=*/true);
  const Ring producer = join(ring, Role::producer), consumer = join(ring, Role::consumer);
  write_one(producer, std::nullopt, 64);
  ring.slots().payload(0)[17] ^= std::byte{1};
  CHECK_THROWS(RingCorrupt, consumer.receive(std::nullopt, within(0s)));
  for (std::uint64_t ticket = 1; ticket < 8; ++ticket) {
    write_one(producer, std::nullopt, 64);
    CHECK(read_one(consumer, std::nullopt) == ticket);
  }
  CHECK(consumer.stats().lost == 1);
}

TEST(long_reasons_are_cut_between_characters) {
  const Ring ring = make_ring(1);
  const Ring producer = join(ring, Role::producer), consumer = join(ring, Role::consumer);
  std::string reason = "x";
  for (int i = 0; i < 90; ++i) reason += "\u00e9";  // two bytes each; 127 fit
  producer.reserve(0, within(0s)).abort(reason);
  CHECK(ring.slots().reason(0) == reason.substr(0, 127));
  consumer.reclaim(0);
  producer.reserve(0, within(0s)).abort(reason.substr(1));
  CHECK(ring.slots().reason(0) == reason.substr(1, 126));
}

TEST(free_running_calls_find_where_tickets_have_got_to) {
  const Ring ring = make_ring(4);
  const Ring producer = join(ring, Role::producer), consumer = join(ring, Role::consumer);
  for (std::uint64_t ticket = 0; ticket < 1001; ++ticket) {
    write_one(producer, ticket);
    read_one(consumer, ticket);
  }
  Lease lease = producer.reserve(std::nullopt, within(0s));
  CHECK(lease.ticket() == 1001);
  fill(lease, 8);
  lease.commit();
  CHECK(read_one(consumer, std::nullopt) == 1001);
}

TEST(close_ends_the_calls_of_other_threads) {
  for (int round = 0; round < 50; ++round) {
    const Ring ring = make_ring(2, 64, RingKind::request);
    const Ring stays = join(ring, Role::consumer), producer = join(ring, Role::producer);
    Ring closing = join(ring, Role::consumer);
    std::thread waiter([&closing] {
      try {
        closing.receive(std::nullopt, within(10s)).release();
      } catch (const TransportError& error) {
        CHECK(contains(error.what(), "closed"));
      }
    });
    if (round % 2 == 0) std::this_thread::sleep_for(1ms);
    std::thread writer([&producer] { write_one(producer, std::nullopt, 8); });
    closing.close();
    CHECK(ring.member()->living().size() == 2);  // nothing is taken in the name of one who left
    waiter.join();
    writer.join();
    if (ring.stats().consumers.records == 0) read_one(stays, std::nullopt);
    CHECK(ring.stats().reading == 0);
  }
}

TEST(close_below_a_waiting_call_ends_it) {  // as from a signal handler
  const Ring ring = make_ring(2);
  const Ring producer = join(ring, Role::producer);
  Ring consumer = join(ring, Role::consumer);
  const Clock::time_point start = Clock::now();
  const Wait wait{.timeout = 10s, .on_tick = [&consumer] { consumer.close(); }};
  CHECK(contains(message_of([&] { static_cast<void>(consumer.receive(std::nullopt, wait)); }), "closed"));
  CHECK(Clock::now() - start < 5s);
  static_cast<void>(join(ring, Role::consumer));  // its place is free
}

TEST(closing_reader_leaves_its_record_to_the_next) {
  const Ring ring = make_ring(2);
  const Ring producer = join(ring, Role::producer);
  Ring first = join(ring, Role::consumer);
  write_one(producer, std::nullopt);
  write_one(producer, std::nullopt);
  Lease unread = first.receive(std::nullopt, within(0s));
  first.close();
  const Ring second = join(ring, Role::consumer);
  CHECK(read_one(second, std::nullopt) == 0 && read_one(second, std::nullopt) == 1);
}

TEST(departure_of_the_other_side_is_noticed_absence_is_not) {
  const Ring ring = make_ring(1);
  const Ring consumer = join(ring, Role::consumer);
  CHECK_THROWS(RingTimeout, consumer.receive(0, within(10ms)));
  {
    const Ring producer = join(ring, Role::producer);
    consumer.wait_for_peer(within(0s));
  }
  CHECK_THROWS(PeerDied, consumer.receive(0, within(10s)));
  std::this_thread::sleep_for(3ms);
  CHECK_THROWS(PeerDied, consumer.try_receive(0));
  CHECK_THROWS(RingTimeout, consumer.wait_for_peer(within(5ms)));
  const Ring producer = join(ring, Role::producer);
  CHECK_THROWS(RingTimeout, consumer.receive(0, within(10ms)));
}

TEST(corrupt_payload_fails_its_checksum_and_can_be_given_again) {
  const Ring ring = make_ring(1, 64, RingKind::data, true);
  const Ring producer = join(ring, Role::producer), consumer = join(ring, Role::consumer);
  write_one(producer, 0, 64);
  ring.slots().payload(0)[17] ^= std::byte{1};
  CHECK_THROWS(RingCorrupt, consumer.receive(0, within(0s)));
  consumer.reclaim(0);
  write_one(producer, 0, 64);
  read_one(consumer, 0);
}

TEST(peer_table_full) {
  const Ring ring = make_ring(1);
  std::vector<Ring> producers;
  for (std::size_t i = 1; i < kMaxPeers; ++i) producers.push_back(join(ring, Role::producer));
  CHECK_THROWS(TransportError, join(ring, Role::producer));
  producers.pop_back();
  static_cast<void>(join(ring, Role::producer));
}

TEST(threads_over_one_mapping_data) {  // free-running, so that producers contend for every slot
  constexpr std::uint64_t kRecords = 3000;
  constexpr int kProducers = 3;
  const Ring ring = make_ring(4, 64);
  const Ring consumer = join(ring, Role::consumer);
  std::vector<std::thread> threads;
  for (int i = 0; i < kProducers; ++i) {
    threads.emplace_back([&ring] {
      const Ring producer = join(ring, Role::producer);
      for (std::uint64_t n = 0; n < kRecords / kProducers; ++n) write_one(producer, std::nullopt, 64);
    });
  }
  for (std::uint64_t ticket = 0; ticket < kRecords; ++ticket) CHECK(read_one(consumer, std::nullopt) == ticket);
  for (std::thread& thread : threads) thread.join();
  CHECK(ring.stats().depth == 0);
}

TEST(threads_over_one_mapping_requests) {  // every message to exactly one of several receivers
  constexpr std::uint64_t kMessages = 3000;
  const Ring ring = make_ring(4, 64, RingKind::request);
  std::vector<std::atomic<int>> received(kMessages);
  std::atomic<std::uint64_t> total{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < 2; ++i) {
    threads.emplace_back([&] {
      const Ring sender = join(ring, Role::producer);
      for (std::uint64_t n = 0; n < kMessages / 2; ++n) write_one(sender, std::nullopt, 32);
    });
    threads.emplace_back([&] {
      const Ring receiver = join(ring, Role::consumer);
      while (total.load() < kMessages) {
        try {
          Lease lease = receiver.receive(std::nullopt, within(20ms));
          CHECK(intact(lease));
          lease.release();
          ++received[lease.ticket()];
          ++total;
        } catch (const RingTimeout&) {
        } catch (const PeerDied&) {  // the senders are through
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::atomic<int>& count : received) CHECK(count.load() == 1);
}

TEST(threads_join_and_leave) {
  const Ring ring = make_ring(4, 64, RingKind::request);
  std::vector<std::thread> threads;
  for (int i = 0; i < 3; ++i) {
    threads.emplace_back([&ring] {
      for (int n = 0; n < 300; ++n) {
        const Ring peer = join(ring, n % 2 == 0 ? Role::producer : Role::consumer);
        CHECK(peer.member()->table.holds(peer.member()->require_joined()));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(ring.stats().died == 0 && ring.member()->living().empty());
}

TEST(notifier_makes_a_descriptor_readable) {
  const Ring ring = make_ring(4);
  const Ring producer = join(ring, Role::producer), consumer = join(ring, Role::consumer);
  const Notifier notifier(consumer.member());
  const auto readable = [&](int timeout_ms) {
    pollfd poll{notifier.fd(), POLLIN, 0};
    return ::poll(&poll, 1, timeout_ms) == 1;
  };
  for (std::uint64_t ticket = 0; ticket < 20; ++ticket) {
    std::thread writer([&] { write_one(producer, ticket); });
    while (true) {
      CHECK(readable(10000));
      notifier.clear();
      if (auto lease = consumer.try_receive(ticket)) {
        lease->release();
        break;
      }
    }
    writer.join();
  }
  notifier.clear();
  CHECK(!readable(20));
}

int main(int argc, char** argv) { return check::run(argc, argv); }
