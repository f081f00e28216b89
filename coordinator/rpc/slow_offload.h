// A step that waits for its offloaded experts (training-runtime.md 12): a finding of `heddle
// doctor` from the metrics of the last steps and the job's configuration. Pure.
#pragma once

#include <optional>
#include <vector>

#include "heddle/v1/config.pb.h"
#include "heddle/v1/control.pb.h"
#include "heddle/v1/jobs.pb.h"

namespace heddle::rpc {

// So many steps are looked at, and fewer than the second number tell nothing.
inline constexpr size_t kOffloadSteps = 20;
inline constexpr size_t kOffloadStepsLeast = 5;

// `points`: the newest steps of one attempt, at most kOffloadSteps. A finding where the median
// share of their time that the rank waited for experts is more than a quarter: what was moved and
// how fast, and the settings that move less. Without time and attempt, which are the caller's.
std::optional<v1::Finding> SlowOffload(const v1::RunConfig& config,
                                       const std::vector<v1::MetricPoint>& points);

}  // namespace heddle::rpc
