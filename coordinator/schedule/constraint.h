// One entry of schedule.constraints against a node's labels (control-plane S3): key=value,
// key!=value, key>=number. Internal to coordinator/schedule.
#pragma once

#include <map>
#include <string>
#include <vector>

namespace heddle::schedule {

// Of jobs over MPI: a worker that finds OpenMPI has this label.
inline constexpr char kMpiConstraint[] = "mpi=openmpi";

// One that was read once, for many nodes.
class Constraint {
 public:
  explicit Constraint(const std::string& text);
  bool Matches(const std::map<std::string, std::string>& labels) const;

 private:
  enum class Test { kNone, kEqual, kUnequal, kAtLeast };
  Test test_ = Test::kNone;
  std::string key_;
  std::string wanted_;
};

// A label that is missing equals nothing and is at least nothing. Text that is no constraint
// matches no node (submits are checked before).
bool Matches(const std::string& constraint, const std::map<std::string, std::string>& labels);
bool MatchesAll(const std::vector<std::string>& constraints,
                const std::map<std::string, std::string>& labels);

}  // namespace heddle::schedule
