// kdflow._ring: the ring for Python. kdflow/transport/ring.py is the face that users see.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "kdflow/dlpack.hpp"
#include "kdflow/notifier.hpp"
#include "kdflow/ring.hpp"

namespace py = pybind11;
using namespace kdflow;

namespace {

using Ticket = std::optional<std::uint64_t>;

// Before 3.14, Python ends a thread that asks for the lock of a finalising interpreter by unwinding its stack, which
// C++ answers with std::terminate. A daemon thread in a wait stays here instead, until the process is gone.
void stay_if_finalizing() {
#if PY_VERSION_HEX >= 0x030d0000
  const bool finalizing = Py_IsFinalizing() != 0;
#else
  const bool finalizing = _Py_IsFinalizing() != 0;
#endif
  while (finalizing) ::pause();
}

// The block runs without the interpreter's lock.
class Unlocked {
 public:
  Unlocked() : state_(PyEval_SaveThread()) {}
  Unlocked(const Unlocked&) = delete;
  ~Unlocked() noexcept(false) {
    stay_if_finalizing();
    PyEval_RestoreThread(state_);
  }

 private:
  PyThreadState* state_;
};

Wait make_wait(double timeout_s) {
  if (!(timeout_s >= 0) || timeout_s > 1e9) {
    throw std::invalid_argument("timeout_s: expected seconds in 0..1e9, got " + std::to_string(timeout_s));
  }
  const auto timeout = std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::duration<double>(timeout_s));
  return Wait{timeout, [] {
                stay_if_finalizing();
                const py::gil_scoped_acquire locked;
                if (PyErr_CheckSignals() != 0) throw py::error_already_set();
              }};
}

Role make_role(const std::string& role) {
  if (role == "producer") return Role::producer;
  if (role == "consumer") return Role::consumer;
  throw std::invalid_argument("role: expected \"producer\" or \"consumer\", got \"" + role + "\"");
}

// The lease must outlive every view, and the mapping every lease: a view never points into unmapped
// memory.
struct View {
  dlpack::ManagedTensor managed{};
  std::vector<std::int64_t> shape;
  std::shared_ptr<Member> member;
};

py::capsule to_dlpack(const Lease& lease) {
  auto view = std::make_unique<View>();
  const Record& record = lease.record;
  view->shape.assign(record.shape, record.shape + record.ndim);
  view->member = lease.member();
  view->managed.tensor = {.data = lease.data(),
                          .device = {1, 0},
                          .ndim = record.ndim,
                          .dtype = {record.dtype_code, record.dtype_bits, 1},
                          .shape = view->shape.data(),
                          .strides = nullptr,
                          .byte_offset = 0};
  view->managed.manager_context = view.get();
  view->managed.deleter = [](dlpack::ManagedTensor* self) { delete static_cast<View*>(self->manager_context); };
  py::capsule capsule(&view->managed, "dltensor", [](PyObject* self) {
    if (!PyCapsule_IsValid(self, "dltensor")) return;  // a consumer renamed it and owns the view
    auto* managed = static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(self, "dltensor"));
    managed->deleter(managed);
  });
  static_cast<void>(view.release());
  return capsule;
}

// Exports the bytes of a slot through the buffer protocol, so that a memoryview keeps the mapping
// alive.
struct Bytes {
  std::shared_ptr<Member> member;
  std::byte* data;
  std::uint64_t nbytes;
  bool readonly;
};

struct PyRing {
  explicit PyRing(Ring opened) : name(opened.slots().name()), ring(std::move(opened)) {}

  const Ring* operator->() const {
    if (!ring) throw TransportError(name + ": this ring is closed");
    return &*ring;
  }
  const Header& header() const { return (*this)->slots().header(); }

  void close() {  // the mapping stays for as long as a lease or a view is around
    notifier.reset();
    if (ring) ring->close();
    ring.reset();
  }

  std::string name;
  std::optional<Ring> ring;
  std::unique_ptr<Notifier> notifier{};
};

py::dict to_dict(const SideStats& side) {
  return py::dict(py::arg("attached") = side.attached, py::arg("live") = side.live, py::arg("records") = side.records,
                  py::arg("bytes") = side.bytes, py::arg("waits") = side.waits,
                  py::arg("wait_s") = static_cast<double>(side.wait_ns) * 1e-9);
}

void set_error(const char* name, const TransportError& error) {
  const py::object type = py::module_::import("kdflow.errors").attr(name);
  const py::object ticket = error.ticket ? py::object(py::int_(*error.ticket)) : py::object(py::none());
  PyErr_SetObject(type.ptr(), type(error.what(), py::arg("ticket") = ticket).ptr());
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

void send(PyRing& self, const py::buffer& payload, double timeout_s) {
  const py::buffer_info info = payload.request();
  if (PyBuffer_IsContiguous(info.view(), 'C') == 0) throw std::invalid_argument("payload: expected contiguous bytes");
  const auto nbytes = static_cast<std::int64_t>(info.size * info.itemsize);
  const Wait wait = make_wait(timeout_s);
  const Unlocked unlocked;
  Lease lease = self->reserve(std::nullopt, wait);
  lease.shape(1, 8, {&nbytes, 1});
  std::memcpy(lease.data(), info.ptr, static_cast<std::size_t>(nbytes));
  lease.commit();
}

}  // namespace

PYBIND11_MODULE(_ring, module) {
  module.doc() = "Slot ring over shared memory (native part of kdflow.transport.ring).";
  py::register_exception_translator(translate);

  py::class_<Bytes>(module, "Bytes", py::buffer_protocol()).def_buffer([](Bytes& self) {
    return py::buffer_info(reinterpret_cast<unsigned char*>(self.data), static_cast<py::ssize_t>(self.nbytes),
                           self.readonly);
  });

  py::class_<Lease>(module, "Lease")
      .def_property_readonly("ticket", &Lease::ticket)
      .def_property_readonly("generation", &Lease::generation)
      .def_property_readonly("held", &Lease::held)
      .def_property_readonly("nbytes", [](const Lease& self) { return self.record.nbytes; })
      .def_property_readonly(
          "dtype", [](const Lease& self) { return std::pair(self.record.dtype_code, self.record.dtype_bits); })
      .def_property_readonly("shape",
                             [](const Lease& self) {
                               return py::tuple(py::cast(
                                   std::vector<std::int64_t>(self.record.shape, self.record.shape + self.record.ndim)));
                             })
      .def_property_readonly("writer_pid", [](const Lease& self) { return self.record.writer_pid; })
      .def_property(
          "microbatch_id", [](const Lease& self) { return self.record.microbatch_id; },
          [](Lease& self, std::int64_t value) { self.record.microbatch_id = value; })
      .def_property(
          "tag", [](const Lease& self) { return self.record.tag; },
          [](Lease& self, std::int64_t value) { self.record.tag = value; })
      .def(
          "set_shape",
          [](Lease& self, std::uint8_t code, std::uint8_t bits, const std::vector<std::int64_t>& shape) {
            self.shape(code, bits, shape);
          },
          py::arg("code"), py::arg("bits"), py::arg("shape"))
      .def("dlpack", &to_dlpack)
      .def(
          "bytes",
          [](const Lease& self, bool readonly) {
            return Bytes{self.member(), self.data(), self.record.nbytes, readonly};
          },
          py::arg("readonly"))
      .def("commit", &Lease::commit, py::call_guard<Unlocked>())
      .def("abort", &Lease::abort, py::arg("reason"), py::call_guard<Unlocked>())
      .def("release", &Lease::release, py::call_guard<Unlocked>());

  py::class_<PyRing>(module, "Ring")
      .def_static(
          "create",
          [](const std::string& name, bool many_consumers, std::uint64_t num_slots, std::uint64_t slot_bytes,
             bool checksum, bool huge_pages, std::optional<int> numa_node) {
            const Unlocked unlocked;
            return PyRing(Ring::create({.name = name,
                                        .kind = many_consumers ? RingKind::request : RingKind::data,
                                        .num_slots = num_slots,
                                        .slot_bytes = slot_bytes,
                                        .checksum = checksum,
                                        .segment = {.huge_pages = huge_pages, .numa_node = numa_node}}));
          },
          py::kw_only(), py::arg("name"), py::arg("many_consumers"), py::arg("num_slots"), py::arg("slot_bytes"),
          py::arg("checksum"), py::arg("huge_pages"), py::arg("numa_node"))
      .def_static(
          "attach",
          [](std::variant<std::string, int> source, const std::string& role, bool guard) {
            const Role parsed = make_role(role);
            const Unlocked unlocked;
            UniqueFd fd;
            if (const auto* handle = std::get_if<std::string>(&source)) {
              fd = open_handle(*handle);
            } else {
              fd = UniqueFd(::fcntl(std::get<int>(source), F_DUPFD_CLOEXEC, 0));
              if (!fd) throw_errno("fd " + std::to_string(std::get<int>(source)));
            }
            return PyRing(Ring::attach(std::move(fd), parsed, {.guard = guard}));
          },
          py::arg("source"), py::kw_only(), py::arg("role"), py::arg("guard"))
      .def_property_readonly("name", [](const PyRing& self) { return self.name; })
      .def_property_readonly("num_slots", [](const PyRing& self) { return self.header().num_slots; })
      .def_property_readonly("slot_bytes", [](const PyRing& self) { return self.header().slot_bytes; })
      .def_property_readonly("many_consumers",
                             [](const PyRing& self) { return self.header().kind == RingKind::request; })
      .def_property_readonly("closed", [](const PyRing& self) { return !self.ring; })
      .def("fileno", [](const PyRing& self) { return self->slots().fd(); })
      .def(
          "reserve",
          [](PyRing& self, Ticket ticket, double timeout_s) {
            const Wait wait = make_wait(timeout_s);
            const Unlocked unlocked;
            return self->reserve(ticket, wait);
          },
          py::arg("ticket"), py::arg("timeout_s"))
      .def(
          "receive",
          [](PyRing& self, Ticket ticket, double timeout_s) {
            const Wait wait = make_wait(timeout_s);
            const Unlocked unlocked;
            return self->receive(ticket, wait);
          },
          py::arg("ticket"), py::arg("timeout_s"))
      .def(
          "try_receive",
          [](PyRing& self, Ticket ticket) {
            const Unlocked unlocked;
            if (self.notifier) self.notifier->clear();
            return self->try_receive(ticket);
          },
          py::arg("ticket"))
      .def("send", &send, py::arg("payload"), py::arg("timeout_s"))
      .def("is_free", [](const PyRing& self, std::uint64_t ticket) { return self->is_free(ticket); })
      .def("reclaim", [](PyRing& self, std::uint64_t ticket) { self->reclaim(ticket); })
      .def(
          "wait_for_peer",
          [](PyRing& self, double timeout_s) {
            const Wait wait = make_wait(timeout_s);
            const Unlocked unlocked;
            self->wait_for_peer(wait);
          },
          py::arg("timeout_s"))
      .def("ready_fd",
           [](PyRing& self) {
             if (!self.notifier) self.notifier = std::make_unique<Notifier>(self->member());
             return self.notifier->fd();
           })
      .def("peers",
           [](PyRing& self) {
             std::vector<std::pair<std::string, std::int32_t>> peers;
             for (const Peer& peer : self->member()->living()) {
               peers.emplace_back(to_string(peer.identity.role()), peer.identity.pid());
             }
             return peers;
           })
      .def("stats",
           [](PyRing& self) {
             const RingStats stats = self->stats();
             return py::dict(py::arg("producers") = to_dict(stats.producers),
                             py::arg("consumers") = to_dict(stats.consumers), py::arg("depth") = stats.depth,
                             py::arg("writing") = stats.writing, py::arg("reading") = stats.reading,
                             py::arg("died") = stats.died, py::arg("abandoned") = stats.abandoned,
                             py::arg("aborted") = stats.aborted, py::arg("reclaimed") = stats.reclaimed,
                             py::arg("lost") = stats.lost);
           })
      .def("close", &PyRing::close, py::call_guard<Unlocked>());
}
