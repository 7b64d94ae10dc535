// The CUDA part of kdflow._ring; kdflow/transport/cuda_ring.py is the face that users see.
#include "bindings.hpp"
#include "kdflow/cuda/stage.hpp"

using namespace kdflow::cuda;

namespace {

StreamHandle to_stream(std::uint64_t handle) { return reinterpret_cast<StreamHandle>(handle); }

py::capsule view_of(StreamLease& self, int ordinal) {
  const bool on_device = self.lease.member()->slots.header().placement == Placement::device;
  return to_dlpack(self.lease.record, reinterpret_cast<void*>(self.address()),
                   on_device ? dlpack::Device{dlpack::kCuda, ordinal} : dlpack::Device{dlpack::kCpu, 0}, self.memory());
}

void bind_stream_lease(py::module_& module) {
  py::class_<StreamLease> type(module, "StreamLease");
  bind_lease(type, [](auto& self) -> auto& { return self.lease; });
  type.def_property_readonly("address", &StreamLease::address)
      .def_property(
          "stream", [](const StreamLease& self) { return reinterpret_cast<std::uint64_t>(self.stream); },
          [](StreamLease& self, std::uint64_t handle) { self.stream = to_stream(handle); })
      .def("dlpack", &view_of, py::arg("ordinal"))
      .def("copy_from", &StreamLease::copy_from, py::arg("address"), py::arg("nbytes"), py::call_guard<Unlocked>())
      .def("copy_to", &StreamLease::copy_to, py::arg("address"), py::arg("nbytes"), py::call_guard<Unlocked>())
      .def("commit", &StreamLease::commit, py::call_guard<Unlocked>())
      .def("abort", &StreamLease::abort, py::arg("reason"), py::call_guard<Unlocked>())
      .def("release", &StreamLease::release, py::call_guard<Unlocked>());
}

void put(Stage& self, Ticket ticket, double timeout_s, std::uint64_t stream, std::uint8_t code, std::uint8_t bits,
         const std::vector<std::int64_t>& shape, DevicePtr address, std::int64_t microbatch_id, std::int64_t tag) {
  Record record{};
  self.member().shape(record, "put", ticket, code, bits, shape);
  record.microbatch_id = microbatch_id;
  record.tag = tag;
  const Wait wait = make_wait(timeout_s);
  const Unlocked unlocked;
  self.put(ticket, record, address, wait, to_stream(stream));
}

void bind_stage(py::module_& module) {
  py::class_<Device, std::shared_ptr<Device>>(module, "Device")
      .def(py::init<int>(), py::arg("ordinal"), py::call_guard<Unlocked>());
  py::class_<Stage, std::shared_ptr<Stage>>(module, "Stage")
      .def(py::init([](const PyRing& ring, std::shared_ptr<Device> device) {
             Ring opened = ring.opened();
             const Unlocked unlocked;
             return std::make_shared<Stage>(std::move(opened), std::move(device));
           }),
           py::arg("ring"), py::arg("device"))
      .def(
          "reserve",
          [](Stage& self, std::optional<std::uint64_t> ticket, double timeout_s, std::uint64_t stream) {
            const Wait wait = make_wait(timeout_s);
            const Unlocked unlocked;
            return self.reserve(ticket, wait, to_stream(stream));
          },
          py::arg("ticket"), py::arg("timeout_s"), py::arg("stream"))
      .def("put", &put, py::arg("ticket"), py::arg("timeout_s"), py::arg("stream"), py::arg("code"), py::arg("bits"),
           py::arg("shape"), py::arg("address"), py::arg("microbatch_id"), py::arg("tag"))
      .def(
          "receive",
          [](Stage& self, std::optional<std::uint64_t> ticket, double timeout_s, std::uint64_t stream) {
            const Wait wait = make_wait(timeout_s);
            const Unlocked unlocked;
            return self.receive(ticket, wait, to_stream(stream));
          },
          py::arg("ticket"), py::arg("timeout_s"), py::arg("stream"))
      .def(
          "try_receive",
          [](Stage& self, std::optional<std::uint64_t> ticket, std::uint64_t stream) {
            const Unlocked unlocked;
            return self.try_receive(ticket, to_stream(stream));
          },
          py::arg("ticket"), py::arg("stream"))
      .def(
          "drain",
          [](Stage& self, double timeout_s) {
            const auto timeout = make_timeout(timeout_s);
            const Unlocked unlocked;
            self.drain(timeout);
          },
          py::arg("timeout_s"))
      .def(
          "close",
          [](Stage& self, double timeout_s, double grace_s) {
            const auto timeout = make_timeout(timeout_s);
            const auto grace = make_timeout(grace_s);
            const Unlocked unlocked;
            return self.close(timeout, grace);
          },
          py::arg("timeout_s"), py::arg("grace_s"));
}

}  // namespace

void bind_cuda(py::module_& module) {
  bind_stream_lease(module);
  bind_stage(module);
  module.def("cuda_unavailable_reason", [] { return Driver::unavailable_reason(); }, py::call_guard<Unlocked>());
  module.def("cuda_device_count", [] {
    int count = 0;
    Driver::get().cuDeviceGetCount(&count);
    return count;
  });
  module.def("cuda_can_access", &can_access, py::arg("from_device"), py::arg("to_device"));
}
