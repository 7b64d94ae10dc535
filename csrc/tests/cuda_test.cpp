// The CUDA ring's threads inside one process, on the stand-in driver of tests/support/fake_cuda.cpp, whose streams are
// threads that copy with memcpy. Under TSan a copy that is not ordered before its record's reader, or a slot that is
// written again before its reader's copy is over, is a data race.
#include <chrono>
#include <thread>
#include <vector>

#include "kdflow/cuda/stage.hpp"
#include "support.hpp"

using namespace support;
using namespace kdflow::cuda;

extern "C" {
StreamHandle fake_stream(int device);
void fake_hold(StreamHandle stream, int held);
void fake_synchronize(StreamHandle stream);
void fake_fail(const char* call, int result, int passing);
int fake_live(const char* what);
void fake_begin_capture();
int fake_end_capture();
}

namespace {

constexpr std::uint64_t kBytes = 512;
constexpr std::uint64_t kNumSlots = 4;
constexpr std::uint64_t kNumRecords = 600;
constexpr int kIllegalAddress = 700;

Ring make_cuda_ring(Placement placement) {
  return Ring::create({.name = "test", .num_slots = kNumSlots, .slot_bytes = kBytes, .placement = placement});
}

std::shared_ptr<Stage> stage_of(const Ring& ring, Role role, int device = 0) {
  return std::make_shared<Stage>(join(ring, role), std::make_shared<const Device>(device));
}

// Memory of a device, which is the host's here.
class Buffer {
 public:
  Buffer(int device, std::uint64_t num_records) : device_(device) {
    const Device::Scope scope(device_);
    device_.driver().cuMemAlloc(&base_, num_records * kBytes);
  }
  ~Buffer() { device_.driver().cuMemFree(base_); }
  Buffer(const Buffer&) = delete;

  DevicePtr at(std::uint64_t record) const { return base_ + record * kBytes; }
  std::byte* bytes(std::uint64_t record) const { return reinterpret_cast<std::byte*>(at(record)); }
  void fill(std::uint64_t record) const {
    for (std::uint64_t i = 0; i < kBytes; ++i) bytes(record)[i] = pattern(record, i);
  }
  bool intact(std::uint64_t record) const {
    for (std::uint64_t i = 0; i < kBytes; ++i) {
      if (bytes(record)[i] != pattern(record, i)) return false;
    }
    return true;
  }

 private:
  const Device device_;
  DevicePtr base_ = 0;
};

Record whole_record(const Stage& stage, std::uint64_t ticket) {
  Record record{};
  const auto extent = static_cast<std::int64_t>(kBytes);
  stage.member().shape(record, "put", ticket, 1, 8, {&extent, 1});
  return record;
}

void put(Stage& stage, std::uint64_t ticket, const Buffer& from, StreamHandle stream) {
  stage.put(ticket, whole_record(stage, ticket), from.at(ticket), within(20s), stream);
}

void receive_all(const std::shared_ptr<Stage>& consumer) {
  const StreamHandle stream = fake_stream(0);
  const Buffer target(0, kNumRecords);
  for (std::uint64_t ticket = 0; ticket < kNumRecords; ++ticket) {
    StreamLease slot = consumer->receive(ticket, within(20s), stream);
    CHECK(slot.lease.record.nbytes == kBytes);
    slot.copy_to(target.at(ticket), kBytes);
    slot.release();
  }
  consumer->drain(20s);
  for (std::uint64_t ticket = 0; ticket < kNumRecords; ++ticket) CHECK(target.intact(ticket));
}

bool nothing_is_left() {
  for (const char* what : {"contexts", "events", "allocations", "opened", "registered"}) {
    if (fake_live(what) != 0) return false;
  }
  return true;
}

}  // namespace

// Two producers, the second one on another device, and a consumer, each with a stream of its own. Every other pair of
// records is put, the rest is copied in a block.
TEST(records_of_two_producers_arrive_whole) {
  const Ring ring = make_cuda_ring(Placement::device);
  const auto consumer = stage_of(ring, Role::consumer);
  std::vector<std::thread> producers;
  for (std::uint64_t first : {0, 1}) {
    producers.emplace_back([&ring, first] {
      const int device = static_cast<int>(first);
      const auto stage = stage_of(ring, Role::producer, device);
      const StreamHandle stream = fake_stream(device);
      const Buffer source(device, kNumRecords);
      for (std::uint64_t ticket = first; ticket < kNumRecords; ticket += 2) {
        source.fill(ticket);
        if (ticket % 4 < 2) {
          put(*stage, ticket, source, stream);
        } else {
          StreamLease slot = stage->reserve(ticket, within(20s), stream);
          slot.lease.record = whole_record(*stage, ticket);
          slot.copy_from(source.at(ticket), kBytes);
          slot.commit();
        }
      }
      stage->drain(20s);
    });
  }
  receive_all(consumer);
  for (std::thread& producer : producers) producer.join();
  CHECK(consumer->close(20s, 20s));
  CHECK(ring.stats().consumers.records == kNumRecords && ring.stats().depth == 0);
  CHECK(nothing_is_left());
}

// A pinned ring is a host ring: the other side sees the bytes of the stream's copy.
TEST(a_pinned_producer_meets_a_reader_on_the_host) {
  const Ring ring = make_cuda_ring(Placement::host);
  std::thread reading([&ring] {
    const Ring consumer = join(ring, Role::consumer);
    for (std::uint64_t ticket = 0; ticket < kNumRecords; ++ticket) CHECK(read_one(consumer, ticket) == ticket);
  });
  const auto producer = stage_of(ring, Role::producer);
  const StreamHandle stream = fake_stream(0);
  {
    const Buffer source(0, kNumRecords);
    for (std::uint64_t ticket = 0; ticket < kNumRecords; ++ticket) {
      source.fill(ticket);
      put(*producer, ticket, source, stream);
    }
    producer->drain(20s);
  }
  reading.join();
  producer->close(20s, 0s);
  CHECK(nothing_is_left());
}

TEST(a_pinned_reader_meets_a_writer_on_the_host) {
  const Ring ring = make_cuda_ring(Placement::host);
  std::thread writing([&ring] {
    const Ring producer = join(ring, Role::producer);
    for (std::uint64_t ticket = 0; ticket < kNumRecords; ++ticket) write_one(producer, ticket, kBytes);
  });
  const auto consumer = stage_of(ring, Role::consumer);
  receive_all(consumer);
  writing.join();
  CHECK(consumer->close(20s, 0s));
  CHECK(nothing_is_left());
}

TEST(a_slot_changes_hands_behind_its_copy) {
  const Ring ring = make_cuda_ring(Placement::device);
  const auto consumer = stage_of(ring, Role::consumer);
  const auto producer = stage_of(ring, Role::producer);
  const StreamHandle writing = fake_stream(0), reading = fake_stream(0);
  {
    const Buffer source(0, kNumSlots), target(0, kNumSlots);
    fake_hold(writing, 1);
    for (std::uint64_t ticket = 0; ticket < kNumSlots; ++ticket) {
      source.fill(ticket);
      put(*producer, ticket, source, writing);
    }
    std::this_thread::sleep_for(20ms);
    for (std::uint64_t ticket = 0; ticket < kNumSlots; ++ticket) CHECK(!consumer->try_receive(ticket, reading));
    CHECK_THROWS(RingTimeout, (producer->drain(1ms), 0));
    fake_hold(writing, 0);
    fake_hold(reading, 1);
    for (std::uint64_t ticket = 0; ticket < kNumSlots; ++ticket) {
      StreamLease slot = consumer->receive(ticket, within(20s), reading);
      slot.copy_to(target.at(ticket), kBytes);
      slot.release();
    }
    std::this_thread::sleep_for(20ms);
    CHECK(ring.stats().reading == kNumSlots);
    fake_hold(reading, 0);
    consumer->drain(20s);
    CHECK(ring.stats().reading == 0);
    for (std::uint64_t ticket = 0; ticket < kNumSlots; ++ticket) CHECK(target.intact(ticket));
  }
  producer->close(20s, 0s);
  CHECK(consumer->close(20s, 20s));
  CHECK(nothing_is_left());
}

TEST(work_that_fails_is_told_on_both_sides) {
  const Ring ring = make_cuda_ring(Placement::device);
  const auto consumer = stage_of(ring, Role::consumer);
  const auto producer = stage_of(ring, Role::producer);
  const StreamHandle stream = fake_stream(0);
  {
    const Buffer source(0, 1);
    source.fill(0);
    fake_hold(stream, 1);
    put(*producer, 0, source, stream);
    fake_fail("cuEventQuery", kIllegalAddress, 0);
    fake_hold(stream, 0);
    CHECK_THROWS(SlotAborted, consumer->receive(0, within(20s), stream));
    fake_fail("cuEventQuery", kSuccess, 0);
    CHECK_THROWS(CudaError, (producer->drain(20s), 0));
    fake_synchronize(stream);  // the copy itself may still be running
  }
  producer->close(20s, 0s);
  CHECK(consumer->close(20s, 0s));
  CHECK(nothing_is_left());
}

// Work that ends while somebody waits for it, while more comes and while the ring is closed.
TEST(closing_meets_work_that_ends) {
  const StreamHandle stream = fake_stream(0);
  for (int round = 0; round < 300; ++round) {
    const Ring ring = make_cuda_ring(Placement::device);
    const auto consumer = stage_of(ring, Role::consumer);
    const auto producer = stage_of(ring, Role::producer);
    {
      const Buffer source(0, kNumSlots);
      std::thread waiting([&] { producer->drain(20s); });
      for (std::uint64_t ticket = 0; ticket < kNumSlots; ++ticket) {
        source.fill(ticket);
        put(*producer, ticket, source, stream);
      }
      waiting.join();
      producer->close(20s, 0s);
    }
    CHECK(ring.stats().producers.records == kNumSlots);
    CHECK(consumer->close(20s, 0s));
  }
  CHECK(nothing_is_left());
}

TEST(the_thread_breaks_no_capture_of_another) {
  const Ring ring = make_cuda_ring(Placement::device);
  const auto consumer = stage_of(ring, Role::consumer);
  const auto producer = stage_of(ring, Role::producer);
  const StreamHandle stream = fake_stream(0);
  {
    const Buffer source(0, 1);
    source.fill(0);
    fake_hold(stream, 1);  // so that it is the thread that ends the record
    put(*producer, 0, source, stream);
    fake_begin_capture();
    fake_hold(stream, 0);
    producer->drain(20s);
    CHECK(fake_end_capture() == 1);
  }
  producer->close(20s, 0s);
  CHECK(consumer->close(20s, 0s));
  CHECK(nothing_is_left());
}

TEST(each_waiting_producer_keeps_its_own_timeout) {  // for a consumer that does not come
  const Ring ring = make_cuda_ring(Placement::device);
  const auto producer = stage_of(ring, Role::producer);
  const StreamHandle stream = fake_stream(0);
  std::thread first([&] { CHECK_THROWS(TransportError, producer->reserve(0, within(20s), stream)); });
  std::this_thread::sleep_for(10ms);
  const Clock::time_point start = Clock::now();
  CHECK_THROWS(RingTimeout, producer->reserve(1, within(5ms), stream));
  CHECK(Clock::now() - start < 10s);
  producer->close(20s, 0s);  // ends the first
  first.join();
  CHECK(nothing_is_left());
}

TEST(closing_meets_calls_of_other_threads) {
  const StreamHandle stream = fake_stream(0);
  for (int round = 0; round < 40; ++round) {
    const Ring ring = make_cuda_ring(Placement::device);
    const auto consumer = stage_of(ring, Role::consumer);
    const auto producer = stage_of(ring, Role::producer);
    {
      const Buffer source(0, 1);
      std::thread writing([&] {
        try {
          while (true) {
            producer->put(std::nullopt, whole_record(*producer, 0), source.at(0), within(20s), stream);
          }
        } catch (const TransportError&) {
        }
      });
      std::thread reading([&] {
        try {
          while (true) consumer->receive(std::nullopt, within(20s), stream).release();
        } catch (const TransportError&) {
        }
      });
      std::this_thread::sleep_for(std::chrono::microseconds(200 * round));
      producer->close(20s, 0s);
      CHECK(consumer->close(20s, 20s));
      writing.join();
      reading.join();
      fake_synchronize(stream);
    }
    CHECK(ring.stats().reading == 0 && ring.stats().writing == 0);
  }
  CHECK(nothing_is_left());
}

TEST(close_below_a_waiting_call_ends_it) {  // as from a signal handler
  const Ring ring = make_cuda_ring(Placement::device);
  const auto consumer = stage_of(ring, Role::consumer);
  const Wait wait{.timeout = 20s, .on_tick = [&] { CHECK(consumer->close(20s, 0s)); }};
  const Clock::time_point start = Clock::now();
  CHECK_THROWS(TransportError, consumer->receive(0, wait, fake_stream(0)));
  CHECK(Clock::now() - start < 10s);
  CHECK(ring.member()->living().empty());
  CHECK(nothing_is_left());
}

TEST(ten_thousand_attachments_leave_nothing) {
  const StreamHandle stream = fake_stream(0);
  const auto attach_and_write = [stream](const Ring& ring, std::uint64_t ticket) {
    const auto producer = stage_of(ring, Role::producer);  // pins the slots, or opens the slab
    StreamLease slot = producer->reserve(ticket, within(20s), stream);
    slot.lease.record = whole_record(*producer, ticket);
    slot.commit();
    producer->close(20s, 0s);
  };
  const Ring pinned = make_cuda_ring(Placement::host);
  const Ring reader = join(pinned, Role::consumer);
  const Ring on_device = make_cuda_ring(Placement::device);
  const auto consumer = stage_of(on_device, Role::consumer);
  for (std::uint64_t ticket = 0; ticket < 10000; ++ticket) {
    attach_and_write(pinned, ticket);
    reader.receive(ticket, within(20s)).release();
    attach_and_write(on_device, ticket);
    consumer->receive(ticket, within(20s), stream).release();
  }
  CHECK(consumer->close(20s, 0s));
  CHECK(on_device.member()->living().empty() && on_device.stats().died == 0);
  CHECK(pinned.stats().died == 0 && pinned.stats().producers.attached == 10000);
  CHECK(nothing_is_left());
}

int main(int argc, char** argv) { return check::run(argc, argv); }
