// What the parts of the module kdflow._ring share.
#pragma once

#include <cxxabi.h>
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "kdflow/dlpack.hpp"
#include "kdflow/notifier.hpp"
#include "kdflow/ring.hpp"

namespace py = pybind11;
using namespace kdflow;

using Ticket = std::optional<std::uint64_t>;

// Takes the interpreter's lock. Before 3.14, Python ends a thread that asks a finalising interpreter for it by
// unwinding the thread's stack, which C++ answers with std::terminate where an exception is on its way already. A
// daemon thread stays here instead, until the process is gone.
template <typename Take>
auto take_lock(const Take& take) {
  try {
    return take();
  } catch (const abi::__forced_unwind&) {
    while (true) ::pause();
  }
}

// The block runs without the interpreter's lock.
class Unlocked {
 public:
  Unlocked() : state_(PyEval_SaveThread()) {}
  Unlocked(const Unlocked&) = delete;
  ~Unlocked() {
    take_lock([this] { PyEval_RestoreThread(state_); });
  }

 private:
  PyThreadState* state_;
};

inline std::chrono::nanoseconds make_timeout(double timeout_s) {
  if (!(timeout_s >= 0) || timeout_s > 1e9) {
    throw std::invalid_argument("timeout_s: expected seconds in 0..1e9, got " + std::to_string(timeout_s));
  }
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::duration<double>(timeout_s));
}

inline Wait make_wait(double timeout_s) {
  return Wait{make_timeout(timeout_s), [] {
                const auto locked = take_lock([] { return std::make_unique<py::gil_scoped_acquire>(); });
                if (PyErr_CheckSignals() != 0) throw py::error_already_set();
              }};
}

inline Role make_role(const std::string& role) {
  if (role == "producer") return Role::producer;
  if (role == "consumer") return Role::consumer;
  throw std::invalid_argument("role: expected \"producer\" or \"consumer\", got \"" + role + "\"");
}

// Memory handed out through DLPack. What owns it must outlive every view: none ever points into unmapped memory.
struct View {
  dlpack::ManagedTensor managed{};
  std::vector<std::int64_t> shape;
  std::shared_ptr<const void> owner;
};

inline py::capsule to_dlpack(const Record& record, void* data, dlpack::Device device,
                             std::shared_ptr<const void> owner) {
  auto view = std::make_unique<View>();
  view->shape.assign(record.shape, record.shape + record.ndim);
  view->owner = std::move(owner);
  view->managed.tensor = {.data = data,
                          .device = device,
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

struct PyRing {
  explicit PyRing(Ring opened) : name(opened.slots().name()), ring(std::move(opened)) {}

  // A copy, for a call that lets go of the interpreter's lock: another thread, or a signal handler, may close
  // meanwhile.
  Ring opened() const {
    if (!ring) throw TransportError(name + ": this ring is closed");
    return *ring;
  }
  Header header() const { return opened().slots().header(); }

  void close() {  // the mapping stays for as long as a lease or a view is around
    std::shared_ptr<Notifier> last_notifier = std::exchange(notifier, nullptr);
    std::optional<Ring> last = std::exchange(ring, std::nullopt);
    const Unlocked unlocked;
    last_notifier.reset();
    if (last) last->close();
    last.reset();
  }

  std::string name;
  std::optional<Ring> ring;
  std::shared_ptr<Notifier> notifier{};
};

// What every lease shows; `lease_of` finds the ring's own lease in it.
template <typename Held, typename LeaseOf>
void bind_lease(py::class_<Held>& type, const LeaseOf& lease_of) {
  type.def_property_readonly("ticket", [=](const Held& self) { return lease_of(self).ticket(); })
      .def_property_readonly("generation", [=](const Held& self) { return lease_of(self).generation(); })
      .def_property_readonly("held", [=](const Held& self) { return lease_of(self).held(); })
      .def_property_readonly("nbytes", [=](const Held& self) { return lease_of(self).record.nbytes; })
      .def_property_readonly("dtype",
                             [=](const Held& self) {
                               const Record& record = lease_of(self).record;
                               return std::pair(record.dtype_code, record.dtype_bits);
                             })
      .def_property_readonly(
          "shape",
          [=](const Held& self) {
            const Record& record = lease_of(self).record;
            return py::tuple(py::cast(std::vector<std::int64_t>(record.shape, record.shape + record.ndim)));
          })
      .def_property_readonly("writer_pid", [=](const Held& self) { return lease_of(self).record.writer_pid; })
      .def_property_readonly("committed_ns", [=](const Held& self) { return lease_of(self).record.committed_ns; })
      .def_property(
          "microbatch_id", [=](const Held& self) { return lease_of(self).record.microbatch_id; },
          [=](Held& self, std::int64_t value) { lease_of(self).record.microbatch_id = value; })
      .def_property(
          "tag", [=](const Held& self) { return lease_of(self).record.tag; },
          [=](Held& self, std::int64_t value) { lease_of(self).record.tag = value; })
      .def(
          "set_shape",
          [=](Held& self, std::uint8_t code, std::uint8_t bits, const std::vector<std::int64_t>& shape) {
            Lease& lease = lease_of(self);
            if (!lease.held()) {
              throw TransportError("ticket " + std::to_string(lease.ticket()) + ": was given back before",
                                   lease.ticket());
            }
            lease.shape(code, bits, shape);
          },
          py::arg("code"), py::arg("bits"), py::arg("shape"));
}

void bind_cuda(py::module_& module);
