// Points at which a test kills the process with SIGKILL; compiled to nothing without
// KDFLOW_FAULT_POINTS.
#pragma once

#ifdef KDFLOW_FAULT_POINTS
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <string_view>

namespace kdflow {

struct FaultPlan {
  const char* point = nullptr;
  int countdown = 0;  // dies at this many passages of the point
};
inline FaultPlan fault_plan;

inline void fault_point(std::string_view point) {
  if (fault_plan.point == nullptr || point != fault_plan.point || --fault_plan.countdown > 0) return;
  ::kill(::getpid(), SIGKILL);
}

}  // namespace kdflow

#define KDFLOW_FAULT(point) ::kdflow::fault_point(point)
#else
#define KDFLOW_FAULT(point) static_cast<void>(0)
#endif
