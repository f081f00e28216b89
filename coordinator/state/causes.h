// Why things fail, wait and end: the one table of base/causes.def with its lookups (control-plane
// P6, 4.6), and the judgement of a rank's exit.
#pragma once

#include <cstdint>
#include <string>

#include "heddle/v1/records.pb.h"
#include "heddle/v1/worker_link.pb.h"

namespace heddle::state {

struct CategoryRule {
  const char* name;   // "OOM_HOST"
  bool retry;         // another attempt may help
  bool burns_budget;  // counts against schedule.max_restarts
  bool blames_node;   // the node is avoided, three times in 24 h quarantine it
};
// The rule of a category; that of UNKNOWN for words it does not know.
const CategoryRule& RuleOf(const std::string& category);

struct CodeEntry {
  const char* code;
  const char* category;  // of failures; "" for waits and states
  const char* advice;    // what a person should do
};
// nullptr for codes that are not in the table.
const CodeEntry* FindCode(const std::string& code);
// Advice for a code, else for its category, else empty.
std::string AdviceFor(const std::string& code, const std::string& category);

// Cause of one rank's end by exit code, signal, oom and its last words (section 4.6). An EXIT frame
// with a category wins. REQUIRES: not a clean exit.
heddle::v1::CauseRecord CauseOfExit(const heddle::v1::RankOutcome& exit, const std::string& worker);
bool IsClean(const heddle::v1::RankOutcome& exit);        // code 0
bool IsPeerFailure(const heddle::v1::RankOutcome& exit);  // code 86, category NETWORK: never root

// Delay before attempt n + 1 after n consecutive failures without progress: 0 for n = 0, else
// min(max, base x 2^(n-1)) with +-20 % that depend only on (job, n).
int64_t BackoffMs(uint64_t job, uint32_t n, int64_t base_ms, int64_t max_ms);

}  // namespace heddle::state
