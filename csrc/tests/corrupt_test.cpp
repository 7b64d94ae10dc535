// Shared memory full of nonsense: every operation ends, in a result or a named error. And nothing leaks.
#include <fcntl.h>

#include <filesystem>
#include <fstream>
#include <random>

#include "kdflow/ring.hpp"
#include "support.hpp"

using namespace support;

namespace {

// Everything a user can do, on memory that may hold anything. Survival is the test; values are free.
void exercise(const Ring& ring) {
  const Wait wait = within(1ms);
  const auto attempt = [](const std::function<void()>& operation) {
    try {
      operation();
    } catch (const TransportError&) {
    } catch (const std::invalid_argument&) {
    }
  };
  std::optional<Ring> producer, consumer;
  attempt([&] { producer = join(ring, Role::producer); });
  attempt([&] { consumer = join(ring, Role::consumer); });
  for (const Ring::Ticket ticket : {Ring::Ticket(), Ring::Ticket(0), Ring::Ticket(5)}) {
    if (producer) {
      attempt([&] {
        Lease lease = producer->reserve(ticket, wait);
        fill(lease, 64);
        lease.commit();
      });
    }
    if (!consumer) continue;
    const auto read = [](Lease lease) {
      std::uint64_t sum = 0;
      for (std::uint64_t i = 0; i < lease.record.nbytes; ++i) sum += static_cast<std::uint64_t>(lease.data()[i]);
      CHECK(sum < UINT64_MAX);
      lease.release();
    };
    attempt([&] { read(consumer->receive(ticket, wait)); });
    attempt([&] {
      if (auto lease = consumer->try_receive(ticket)) read(std::move(*lease));
    });
    attempt([&] { consumer->reclaim(ticket.value_or(1)); });
    attempt([&] { static_cast<void>(consumer->is_free(3)); });
    attempt([&] { static_cast<void>(consumer->stats()); });
  }
}

std::size_t resident_pages() {
  std::ifstream statm("/proc/self/statm");
  std::size_t total = 0, resident = 0;
  statm >> total >> resident;
  return resident;
}

std::size_t count_entries(const char* path) {
  std::size_t count = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator(path)) ++count;
  return count;
}

}  // namespace

TEST(every_byte_of_the_header_is_checked) {
  const Ring ring = make_ring(4, 64);
  std::byte* memory = ring.slots().segment()->at(0);
  for (std::size_t i = 0; i < offsetof(Header, crc) + 4; ++i) {
    for (const int flip : {0x01, 0x80, 0xff}) {
      const std::byte saved = memory[i];
      memory[i] ^= static_cast<std::byte>(flip);
      CHECK_THROWS(RingCorrupt, join(ring, Role::producer));
      memory[i] = saved;
    }
  }
  static_cast<void>(join(ring, Role::producer));
}

TEST(sizes_with_a_valid_checksum_are_not_believed) {
  const Ring ring = make_ring(4, 64);
  Header& header = *reinterpret_cast<Header*>(ring.slots().segment()->at(0));
  const Header good = header;
  std::mt19937_64 random(1);
  for (int i = 0; i < 2000; ++i) {
    header = good;
    std::uint64_t* const fields[] = {&header.num_slots, &header.slot_bytes, &header.payload_stride,
                                     &header.payload_offset, &header.segment_bytes};
    const std::uint64_t values[] = {0,          1,        good.num_slots + 1, good.segment_bytes,
                                    UINT64_MAX, random(), random() % 9999};
    std::uint64_t& field = *fields[random() % std::size(fields)];
    const std::uint64_t value = values[random() % std::size(values)];
    const bool harmless = value == field || (&field == &header.slot_bytes && value > 0 && value <= kPageBytes);
    field = value;
    header.crc = header.expected_crc();
    if (!harmless) CHECK_THROWS(RingCorrupt, join(ring, Role::producer));
  }
}

TEST(header_overwritten_later_is_noticed) {
  const Ring ring = make_ring(4, 64);
  const Ring consumer = join(ring, Role::consumer);
  ring.slots().segment()->at(offsetof(Header, slot_bytes))[0] ^= std::byte{1};
  CHECK_THROWS(RingCorrupt, consumer.receive(0, within(1s)));
}

TEST(random_bytes_anywhere) {
  std::mt19937_64 random(2);
  for (int i = 0; i < 300; ++i) {
    const Ring ring = make_ring(2, 64, i % 2 == 0 ? RingKind::data : RingKind::request, i % 3 == 0);
    {
      const Ring producer = join(ring, Role::producer);
      write_one(producer, std::nullopt, 64);
    }
    std::byte* memory = ring.slots().segment()->at(0);
    const std::size_t state_bytes = ring.slots().header().payload_offset;
    for (std::uint64_t n = 1 + random() % 16; n > 0; --n) {
      memory[kCursorsOffset + random() % (state_bytes - kCursorsOffset)] = static_cast<std::byte>(random());
    }
    exercise(ring);
  }
}

TEST(random_words_in_each_field_of_the_state) {
  std::mt19937_64 random(3);
  const std::size_t offsets[] = {
      kCursorsOffset, kCursorsOffset + kCacheLine,     kPeersOffset, kPeersOffset + 8, kPeersOffset + kCacheLine,
      kSlotsOffset,   kSlotsOffset + sizeof(SlotState)};
  for (int i = 0; i < 400; ++i) {
    const Ring ring = make_ring(2, 64);
    {
      const Ring producer = join(ring, Role::producer);
      write_one(producer, std::nullopt, 64);
    }
    std::byte* memory = ring.slots().segment()->at(0);
    const std::size_t record_word = kSlotsOffset + kCacheLine + 8 * (random() % (sizeof(Record) / 8));
    const std::size_t offset = i % 2 == 0 ? record_word : offsets[random() % std::size(offsets)];
    const std::uint64_t values[] = {0, UINT64_MAX, random(), random() % 64, std::uint64_t{1} << (random() % 64)};
    std::memcpy(memory + offset, &values[random() % std::size(values)], 8);
    exercise(ring);
  }
}

TEST(not_a_ring) {
  CHECK_THROWS(RingCorrupt, Ring::attach(UniqueFd(::open("/dev/null", O_RDWR)), Role::producer));
  CHECK_THROWS(RingCorrupt, Ring::attach(UniqueFd(), Role::producer));
  UniqueFd unsealed(::memfd_create("unsealed", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  CHECK(::ftruncate(unsealed.get(), 1 << 20) == 0);
  CHECK_THROWS(RingCorrupt, Ring::attach(std::move(unsealed), Role::producer));
  UniqueFd zeros(::memfd_create("zeros", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  CHECK(::ftruncate(zeros.get(), 1 << 20) == 0);
  CHECK(::fcntl(zeros.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW) == 0);
  CHECK_THROWS(RingCorrupt, Ring::attach(std::move(zeros), Role::producer));
  for (const char* handle : {"", "1", "1:", ":1", "1:2", "1:2:", "1:2:x", "1:2:3:4", "1:2:3 ", "-1:2:3", "x:y:z",
                             "0:0:0", "99999999999:1:1", "1:1:fffffffffffffffff"}) {
    CHECK_THROWS(std::invalid_argument, Handle::parse(handle));
  }
  const Handle longest{.pid = 1, .fd = 2, .id = UINT64_MAX};
  CHECK(Handle::parse("1:2:ff").id == 255 && longest.text() == "1:2:ffffffffffffffff");
  CHECK_THROWS(TransportError, Handle::parse("1073741823:0:0").open());
}

TEST(segment_cannot_be_shrunk_or_unsealed) {
  const Ring ring = make_ring();
  CHECK(::ftruncate(ring.slots().fd(), 0) != 0);
  CHECK(::fcntl(ring.slots().fd(), F_ADD_SEALS, F_SEAL_WRITE) != 0);
}

TEST(ten_thousand_cycles_leave_nothing) {
  const auto cycle = [] {
    const Ring ring = make_ring(2, 64);
    const Handle handle = Handle::parse(ring.handle().text());
    const Ring producer = Ring::attach(handle, Role::producer);
    Ring consumer = Ring::attach(handle, Role::consumer);
    write_one(producer, 0, 64);
    read_one(consumer, 0);
    consumer.close();
  };
  for (int i = 0; i < 100; ++i) cycle();
  const std::size_t fds = count_entries("/proc/self/fd"), pages = resident_pages();
  for (int i = 0; i < 10000; ++i) cycle();
  CHECK(count_entries("/proc/self/fd") == fds);
#ifndef __SANITIZE_ADDRESS__  // its quarantine grows
  CHECK(resident_pages() < pages + 256);
#else
  CHECK(pages > 0);
#endif
}

int main(int argc, char** argv) { return check::run(argc, argv); }
