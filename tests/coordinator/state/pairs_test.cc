// Every (state, input) pair of control-plane 4.1 and 4.2 against a table written by hand, and every
// verb of a user on a job in every state.
#include <map>

#include "coordinator/state/transitions.h"
#include "tests/coordinator/state/cluster.h"

namespace heddle::state {
namespace {

namespace v1 = heddle::v1;

template <typename Rows, typename Input>
std::string RowsFor(const Rows& table, int from, Input input) {
  std::string names;
  for (const auto& row : table) {
    if ((row.from & (uint32_t{1} << from)) != 0 && row.input == input) {
      names += (names.empty() ? "" : " ") + std::string(row.name);
    }
  }
  return names.empty() ? "-" : names;
}

TEST(JobTable, HasExactlyTheRowsOfTheDesign) {
  // Inputs: release hold pause cancel resume reconsider placed ended backoff time infeasible.
  const std::map<int, std::vector<std::string>> expected = {
      {v1::JOB_STATE_HELD, {"J4 J4", "-", "-", "J17", "-", "-", "-", "-", "-", "-", "-"}},
      {v1::JOB_STATE_WAITING, {"-", "J13", "J13", "J17", "-", "J5 J6", "-", "-", "-", "-", "-"}},
      {v1::JOB_STATE_QUEUED, {"-", "J13", "J13", "J17", "-", "-", "J7", "-", "-", "-", "J22"}},
      {v1::JOB_STATE_ACTIVE,
       {"-", "-", "J14", "J18", "-", "-", "-", "J8 J11 J9 J10", "-", "J20", "-"}},
      {v1::JOB_STATE_BACKOFF, {"-", "J13", "J13", "J17", "-", "-", "-", "-", "J12", "-", "-"}},
      {v1::JOB_STATE_PAUSED, {"-", "-", "-", "J17", "J16 J16", "-", "-", "-", "-", "-", "-"}},
      {v1::JOB_STATE_STOPPING,
       {"-", "-", "-", "J18", "-", "-", "-", "J8 J15 J19 J21", "-", "-", "-"}},
      {v1::JOB_STATE_DONE, {"-", "-", "-", "-", "J24", "-", "-", "-", "-", "-", "-"}},
  };
  for (const auto& [from, row] : expected) {
    for (int input = 0; input < kJobInputCount; ++input) {
      EXPECT_EQ(RowsFor(JobTable(), from, static_cast<JobInput>(input)),
                row[static_cast<size_t>(input)])
          << Name(static_cast<v1::JobState>(from)) << " input " << input;
    }
  }
}

TEST(AttemptTable, HasExactlyTheRowsOfTheDesign) {
  // Inputs: tasks deadline stop worker-lost hang.
  const std::map<int, std::vector<std::string>> expected = {
      {v1::ATTEMPT_STATE_ALLOCATED, {"A2 A4 A1", "A2", "A10", "A11", "-"}},
      {v1::ATTEMPT_STATE_PREPARING, {"A4 A3", "A4", "A10", "A11", "-"}},
      {v1::ATTEMPT_STATE_RENDEZVOUS, {"A8 A5", "A6", "A10", "A11", "-"}},
      {v1::ATTEMPT_STATE_RUNNING, {"A8 A7", "-", "A10", "A11", "A9"}},
      {v1::ATTEMPT_STATE_STOPPING, {"A12", "A8 A13", "A10", "A11", "-"}},
      {v1::ATTEMPT_STATE_FENCING, {"A14", "-", "-", "-", "-"}},
      {v1::ATTEMPT_STATE_ENDED, {"-", "-", "-", "-", "-"}},
  };
  for (const auto& [from, row] : expected) {
    for (int input = 0; input < kAttemptInputCount; ++input) {
      EXPECT_EQ(RowsFor(AttemptTable(), from, static_cast<AttemptInput>(input)),
                row[static_cast<size_t>(input)])
          << Name(static_cast<v1::AttemptState>(from)) << " input " << input;
    }
  }
}

// A job in each state, by the shortest way there.
JobId InState(Cluster& c, const std::string& wanted) {
  c.Join("a");
  c.Join("b");
  if (wanted == "HELD") {
    event::JobSubmitted submit = c.Submission();
    submit.hold = true;
    return c.Do(submit).job;
  }
  if (wanted == "WAITING") {
    const JobId first = c.Submit();
    event::JobSubmitted submit = c.Submission();
    submit.after.emplace_back().set_job(first.value);
    return c.Do(submit).job;
  }
  if (wanted == "QUEUED") return c.Submit();
  if (wanted == "PAUSED") {
    const JobId job = c.Submit();
    c.Stop(job, v1::STOP_VERB_PAUSE);
    return job;
  }
  const JobId job = c.Running();
  if (wanted == "STOPPING") c.Stop(job, v1::STOP_VERB_PAUSE);
  if (wanted == "CANCELLING") c.Stop(job, v1::STOP_VERB_CANCEL);
  if (wanted == "BACKOFF") {
    // Twice without a step: the second failure of another kind waits.
    c.TellExit(job, 0, 1);
    c.TellExit(job, 1, 86);
    EXPECT_EQ(c.JobState(job), "BACKOFF");
  }
  if (wanted == "DONE") {
    c.TellExit(job, 0, 0);
    c.TellExit(job, 1, 0);
  }
  return job;
}

TEST(Verbs, DoWhatTheTableSaysInEveryState) {
  // State after hold, release, pause, cancel, preempt, resume; "!" refused with nothing changed.
  const std::map<std::string, std::vector<std::string>> expected = {
      {"HELD", {"HELD", "QUEUED", "!", "DONE", "!", "!"}},
      {"WAITING", {"HELD", "WAITING", "PAUSED", "DONE", "!", "!"}},
      {"QUEUED", {"HELD", "QUEUED", "PAUSED", "DONE", "QUEUED", "QUEUED"}},
      {"ACTIVE", {"!", "!", "STOPPING", "STOPPING", "ACTIVE", "ACTIVE"}},
      {"BACKOFF", {"HELD", "!", "PAUSED", "DONE", "!", "!"}},
      {"PAUSED", {"!", "!", "PAUSED", "DONE", "!", "QUEUED"}},
      {"STOPPING", {"!", "!", "STOPPING", "STOPPING", "!", "!"}},
      {"CANCELLING", {"!", "!", "!", "STOPPING", "!", "!"}},
      {"DONE", {"!", "!", "!", "!", "!", "QUEUED"}},
  };
  for (const auto& [from, results] : expected) {
    for (size_t verb = 0; verb < results.size(); ++verb) {
      Cluster c;
      const JobId job = InState(c, from);
      const std::string before = c.state.job(job)->SerializeAsString();
      const ClientRequest request{"me", "", "", 0};
      Outcome outcome;
      switch (verb) {
        case 0:
          outcome = c.Do(event::JobHeld{request, job});
          break;
        case 1:
          outcome = c.Do(event::JobReleased{request, job});
          break;
        case 5:
          outcome = c.Do(event::JobResumed{request, job, {}});
          break;
        default:
          outcome = c.Stop(job, verb == 2   ? v1::STOP_VERB_PAUSE
                                : verb == 3 ? v1::STOP_VERB_CANCEL
                                            : v1::STOP_VERB_PREEMPT);
      }
      if (results[verb] == "!") {
        EXPECT_EQ(outcome.status.code(), absl::StatusCode::kFailedPrecondition)
            << from << " verb " << verb << " " << outcome.status;
        EXPECT_EQ(c.state.job(job)->SerializeAsString(), before) << from << " verb " << verb;
        EXPECT_TRUE(outcome.events.empty()) << from << " verb " << verb;
      } else {
        EXPECT_TRUE(outcome.status.ok()) << from << " verb " << verb << " " << outcome.status;
        EXPECT_EQ(c.JobState(job), results[verb]) << from << " verb " << verb;
      }
    }
  }
}

}  // namespace
}  // namespace heddle::state
