// kdflow._ring: the ring for Python. kdflow/transport/ring.py is the face that users see.
#include "bindings.hpp"

#include <cstring>

namespace {

// Exports the bytes of a slot through the buffer protocol, so that a memoryview keeps the mapping
// alive.
struct Bytes {
  std::shared_ptr<Member> member;
  std::byte* data;
  std::uint64_t nbytes;
  bool readonly;
};

py::dict to_dict(const SideStats& side) {
  return py::dict(py::arg("attached") = side.attached, py::arg("live") = side.live, py::arg("records") = side.records,
                  py::arg("bytes") = side.bytes, py::arg("waits") = side.waits,
                  py::arg("wait_s") = static_cast<double>(side.wait_ns) * 1e-9);
}

void set_error(const char* name, const TransportError& error) {
  const py::object type = py::module_::import("kdflow.errors").attr(name);
  const py::object ticket = error.ticket ? py::object(py::int_(*error.ticket)) : py::object(py::none());
  // What another process gave as its reason may be anything.
  const auto text = py::reinterpret_steal<py::str>(
      PyUnicode_DecodeUTF8(error.what(), static_cast<py::ssize_t>(std::strlen(error.what())), "replace"));
  PyErr_SetObject(type.ptr(), type(text, py::arg("ticket") = ticket).ptr());
}

void translate(std::exception_ptr thrown) {
  try {
    if (thrown) std::rethrow_exception(thrown);
  } catch (const PeerDied& error) {
    set_error("PeerDied", error);
  } catch (const RingTimeout& error) {
    set_error("RingTimeout", error);
  } catch (const RingCorrupt& error) {
    set_error("RingCorrupt", error);
  } catch (const SlotAborted& error) {
    set_error("SlotAborted", error);
  } catch (const TransportError& error) {
    set_error("TransportError", error);
  }
}

void put(PyRing& self, Ticket ticket, double timeout_s, std::uint8_t code, std::uint8_t bits,
         const std::vector<std::int64_t>& shape, std::uintptr_t address, std::int64_t microbatch_id, std::int64_t tag) {
  const Ring ring = self.opened();
  Record record{};
  ring.member()->shape(record, "put", ticket, code, bits, shape);
  record.microbatch_id = microbatch_id;
  record.tag = tag;
  const Wait wait = make_wait(timeout_s);
  const Unlocked unlocked;
  ring.put(ticket, record, reinterpret_cast<const void*>(address), wait);
}

void send(PyRing& self, const py::buffer& payload, double timeout_s) {
  const py::buffer_info info = payload.request();
  if (PyBuffer_IsContiguous(info.view(), 'C') == 0) throw std::invalid_argument("payload: expected contiguous bytes");
  const auto nbytes = static_cast<std::int64_t>(info.size * info.itemsize);
  const Ring ring = self.opened();
  Record record{};
  ring.member()->shape(record, "send", std::nullopt, 1, 8, {&nbytes, 1});
  const Wait wait = make_wait(timeout_s);
  const Unlocked unlocked;
  ring.put(std::nullopt, record, info.ptr, wait);
}

}  // namespace

PYBIND11_MODULE(_ring, module) {
  module.doc() = "Slot ring over shared memory (native part of kdflow.transport.ring).";
  py::register_exception_translator(translate);

  py::class_<Bytes>(module, "Bytes", py::buffer_protocol()).def_buffer([](Bytes& self) {
    return py::buffer_info(reinterpret_cast<unsigned char*>(self.data), static_cast<py::ssize_t>(self.nbytes),
                           self.readonly);
  });

  py::class_<Lease> lease(module, "Lease");
  bind_lease(lease, [](auto& self) -> auto& { return self; });
  lease
      .def("dlpack",
           [](const Lease& self) { return to_dlpack(self.record, self.data(), {dlpack::kCpu, 0}, self.member()); })
      .def(
          "bytes",
          [](const Lease& self, bool readonly) {
            return Bytes{self.member(), self.data(), self.record.nbytes, readonly};
          },
          py::arg("readonly"))
      .def(
          "copy_from",
          [](Lease& self, std::uintptr_t address, std::uint64_t nbytes) {
            if (nbytes != self.record.nbytes) throw std::invalid_argument("copy_from: another size than the record's");
            self.fill(reinterpret_cast<const void*>(address));
          },
          py::arg("address"), py::arg("nbytes"), py::call_guard<Unlocked>())
      .def("commit", &Lease::commit, py::call_guard<Unlocked>())
      .def("abort", &Lease::abort, py::arg("reason"), py::call_guard<Unlocked>())
      .def("release", &Lease::release, py::call_guard<Unlocked>());

  py::class_<PyRing>(module, "Ring")
      .def_static(
          "create",
          [](const std::string& name, bool many_consumers, std::uint64_t num_slots, std::uint64_t slot_bytes,
             bool checksum, bool huge_pages, std::optional<int> numa_node, bool in_device_memory) {
            const Unlocked unlocked;
            return PyRing(Ring::create({.name = name,
                                        .kind = many_consumers ? RingKind::request : RingKind::data,
                                        .num_slots = num_slots,
                                        .slot_bytes = slot_bytes,
                                        .checksum = checksum,
                                        .placement = in_device_memory ? Placement::device : Placement::host,
                                        .segment = {.huge_pages = huge_pages, .numa_node = numa_node}}));
          },
          py::kw_only(), py::arg("name"), py::arg("many_consumers"), py::arg("num_slots"), py::arg("slot_bytes"),
          py::arg("checksum"), py::arg("huge_pages"), py::arg("numa_node"), py::arg("in_device_memory") = false)
      .def_static(
          "attach",
          [](std::variant<std::string, int> source, const std::string& role, bool many_consumers,
             std::optional<bool> in_device_memory, bool guard, std::optional<int> spin_us) {
            const Role parsed = make_role(role);
            const Unlocked unlocked;
            AttachOptions options{.guard = guard, .kind = many_consumers ? RingKind::request : RingKind::data};
            if (in_device_memory) options.placement = *in_device_memory ? Placement::device : Placement::host;
            if (spin_us) options.max_spin = std::chrono::microseconds(*spin_us);
            if (const auto* handle = std::get_if<std::string>(&source)) {
              return PyRing(Ring::attach(Handle::parse(*handle), parsed, options));
            }
            UniqueFd fd(::fcntl(std::get<int>(source), F_DUPFD_CLOEXEC, 0));
            if (!fd) throw_errno("fd " + std::to_string(std::get<int>(source)));
            return PyRing(Ring::attach(std::move(fd), parsed, options));
          },
          py::arg("source"), py::kw_only(), py::arg("role"), py::arg("many_consumers"),
          py::arg("in_device_memory") = std::nullopt, py::arg("guard") = false, py::arg("max_spin_us") = std::nullopt)
      .def_property_readonly("name", [](const PyRing& self) { return self.name; })
      .def_property_readonly("num_slots", [](const PyRing& self) { return self.header().num_slots; })
      .def_property_readonly("slot_bytes", [](const PyRing& self) { return self.header().slot_bytes; })
      .def_property_readonly("in_device_memory",
                             [](const PyRing& self) { return self.header().placement == Placement::device; })
      .def_property_readonly("closed", [](const PyRing& self) { return !self.ring; })
      .def_property_readonly("handle", [](const PyRing& self) { return self.opened().handle().text(); })
      .def("fileno", [](const PyRing& self) { return self.opened().slots().fd(); })
      .def(
          "reserve",
          [](PyRing& self, Ticket ticket, double timeout_s) {
            const Ring ring = self.opened();
            const Wait wait = make_wait(timeout_s);
            const Unlocked unlocked;
            return ring.reserve(ticket, wait);
          },
          py::arg("ticket"), py::arg("timeout_s"))
      .def(
          "receive",
          [](PyRing& self, Ticket ticket, double timeout_s) {
            const Ring ring = self.opened();
            const Wait wait = make_wait(timeout_s);
            const Unlocked unlocked;
            return ring.receive(ticket, wait);
          },
          py::arg("ticket"), py::arg("timeout_s"))
      .def(
          "try_receive",
          [](PyRing& self, Ticket ticket) {
            const Ring ring = self.opened();
            if (self.notifier) self.notifier->clear();
            const Unlocked unlocked;
            return ring.try_receive(ticket);
          },
          py::arg("ticket"))
      .def("put", &put, py::arg("ticket"), py::arg("timeout_s"), py::arg("code"), py::arg("bits"), py::arg("shape"),
           py::arg("address"), py::arg("microbatch_id"), py::arg("tag"))
      .def("send", &send, py::arg("payload"), py::arg("timeout_s"))
      .def("is_free", [](const PyRing& self, std::uint64_t ticket) { return self.opened().is_free(ticket); })
      .def("reclaim", [](PyRing& self, std::uint64_t ticket) { self.opened().reclaim(ticket); })
      .def(
          "wait_for_peer",
          [](PyRing& self, double timeout_s) {
            const Ring ring = self.opened();
            const Wait wait = make_wait(timeout_s);
            const Unlocked unlocked;
            ring.wait_for_peer(wait);
          },
          py::arg("timeout_s"))
      .def("ready_fd",
           [](PyRing& self) {
             if (!self.notifier) self.notifier = std::make_shared<Notifier>(self.opened().member());
             return self.notifier->fd();
           })
      .def("clear_ready",
           [](PyRing& self) {
             if (self.notifier) self.notifier->clear();
           })
      .def("peers",
           [](PyRing& self) {
             std::vector<std::pair<std::string, std::int32_t>> peers;
             for (const Peer& peer : self.opened().member()->living()) {
               peers.emplace_back(to_string(peer.identity.role()), peer.identity.pid());
             }
             return peers;
           })
      .def("stats",
           [](PyRing& self) {
             const RingStats stats = self.opened().stats();
             return py::dict(py::arg("producers") = to_dict(stats.producers),
                             py::arg("consumers") = to_dict(stats.consumers), py::arg("depth") = stats.depth,
                             py::arg("writing") = stats.writing, py::arg("reading") = stats.reading,
                             py::arg("died") = stats.died, py::arg("abandoned") = stats.abandoned,
                             py::arg("aborted") = stats.aborted, py::arg("reclaimed") = stats.reclaimed,
                             py::arg("lost") = stats.lost);
           })
      .def("close", &PyRing::close);

  bind_cuda(module);
}
