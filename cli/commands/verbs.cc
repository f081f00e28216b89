// The list of all verbs, in the order in which help shows them.
#include "cli/commands/verbs.h"

#include <utility>

namespace heddle::cli {

std::vector<Verb> AllVerbs() {
  std::vector<Verb> all;
  for (auto make :
       {ClusterVerbs,    SubmitVerbs,     PlanVerbs,   BenchHostVerbs, ListVerbs,  DescribeVerbs,
        DoctorVerbs,     EventVerbs,      LogVerbs,    MetricVerbs,    WaitVerbs,  StopVerbs,
        ResumeVerbs,     CheckpointVerbs, NodeVerbs,   DataVerbs,      ModelVerbs, ConfigVerbs,
        CompletionVerbs, HelpVerbs,       VersionVerbs}) {
    for (Verb& verb : make()) {
      all.push_back(std::move(verb));
    }
  }
  return all;
}

int ExitCode(const Status& status) {
  switch (status.code()) {
    case StatusCode::kInvalidArgument:
      return 2;
    case StatusCode::kNotFound:
      return 3;
    case StatusCode::kUnavailable:
    case StatusCode::kDeadlineExceeded:
      return 4;
    case StatusCode::kUnauthenticated:
    case StatusCode::kPermissionDenied:
      return 5;
    case StatusCode::kAborted:
    case StatusCode::kAlreadyExists:
    case StatusCode::kFailedPrecondition:
      return 6;
    default:
      return 1;
  }
}

}  // namespace heddle::cli
