#include "coordinator/state/causes.h"

#include <algorithm>

#include "base/rng/rng.h"
#include "base/status/status.h"

namespace heddle::state {

namespace v1 = heddle::v1;

namespace {

constexpr CategoryRule kCategories[] = {
#define HEDDLE_CATEGORY(name, retry, burns, blames) {#name, retry, burns, blames},
#include "base/causes.def"
};

constexpr CodeEntry kCodes[] = {
#define HEDDLE_CAUSE(code, category, advice) {#code, #category, advice},
#include "base/causes.def"
};

// The code that stands for a category when a rank names only the category.
std::string CodeOfCategory(const std::string& category) {
  if (category == "OOM_HOST") return "OOM_KILLED";
  if (category == "OOM_GPU") return "GPU_OUT_OF_MEMORY";
  if (category == "NETWORK") return "PEER_FAILED";
  if (category == "STORAGE") return "STORAGE_ERROR";
  if (category == "NUMERIC") return "NUMERIC_HALT";
  if (category == "ROLLBACK") return "ROLLED_BACK";
  if (category == "USER_CONFIG") return "BAD_CONFIG";
  if (category == "USER_DATA") return "BAD_DATA";
  if (category == "USER_CODE") return "NOT_RETRYABLE";
  if (category == "HUNG") return "HUNG";
  if (category == "CONTROL_PLANE") return "SHIM_LOST";
  return "EXIT_NONZERO";
}

// Exit codes of trainers (control-plane 4.6).
std::string CodeOfExit(const v1::RankOutcome& exit) {
  if (exit.oom()) return "OOM_KILLED";
  if (exit.has_signal() && exit.signal() != 0) return "KILLED_BY_SIGNAL";
  if (!exit.has_exit_code()) return "CONTROL_CLOSED";
  switch (exit.exit_code()) {
    case 85:
      return "LEFT_UNASKED";
    case 86:
      return "PEER_FAILED";
    case 87:
      return "STORAGE_ERROR";
    case 88:
      return "NUMERIC_HALT";
    case 89:
      return "GPU_OUT_OF_MEMORY";
    case 90:
      return "ROLLED_BACK";
    case 93:
      return "NOT_RETRYABLE";
    case 94:
      return "FENCED_EXIT";
    default:
      return "EXIT_NONZERO";
  }
}

}  // namespace

const CategoryRule& RuleOf(const std::string& category) {
  const CategoryRule* unknown = nullptr;
  for (const CategoryRule& rule : kCategories) {
    if (category == rule.name) {
      return rule;
    }
    if (std::string("UNKNOWN") == rule.name) {
      unknown = &rule;
    }
  }
  return *unknown;
}

const CodeEntry* FindCode(const std::string& code) {
  for (const CodeEntry& entry : kCodes) {
    if (code == entry.code) {
      return &entry;
    }
  }
  return nullptr;
}

std::string AdviceFor(const std::string& code, const std::string& category) {
  // A known code without advice needs none; that of its category would speak of a failing rank.
  if (const CodeEntry* entry = FindCode(code); entry != nullptr) {
    return entry->advice;
  }
  const CodeEntry* entry = category.empty() ? nullptr : FindCode(CodeOfCategory(category));
  return entry == nullptr ? std::string() : entry->advice;
}

v1::CauseRecord CauseOfExit(const v1::RankOutcome& exit, const std::string& worker) {
  v1::CauseRecord cause;
  if (!exit.category().empty()) {
    cause.set_category(exit.category());
    cause.set_code(exit.category() == "UNKNOWN" ? CodeOfExit(exit)
                                                : CodeOfCategory(exit.category()));
  } else {
    cause.set_code(CodeOfExit(exit));
    cause.set_category(FindCode(cause.code())->category);
  }
  cause.set_rank(exit.rank());
  cause.set_node(worker);
  cause.set_at(exit.at());
  cause.set_step(exit.step());
  std::string how;
  if (exit.oom()) {
    how = "killed for lack of memory";
  } else if (exit.has_signal() && exit.signal() != 0) {
    how = Str("killed by signal ", exit.signal());
  } else if (exit.has_exit_code()) {
    how = Str("exit status ", exit.exit_code());
  } else {
    how = "control socket closed";
  }
  cause.set_detail(exit.detail().empty()
                       ? Str("rank ", exit.rank(), ": ", how)
                       : Str("rank ", exit.rank(), ": ", how, ": ", exit.detail()));
  return cause;
}

bool IsClean(const v1::RankOutcome& exit) {
  return exit.has_exit_code() && exit.exit_code() == 0 && !exit.oom() && exit.signal() == 0;
}

bool IsPeerFailure(const v1::RankOutcome& exit) {
  return exit.category().empty() ? exit.exit_code() == 86 : exit.category() == "NETWORK";
}

int64_t BackoffMs(uint64_t job, uint32_t n, int64_t base_ms, int64_t max_ms) {
  if (n == 0) {
    return 0;
  }
  const uint32_t doublings = std::min<uint32_t>(n - 1, 30);
  const int64_t plain = std::min(max_ms, base_ms << doublings);
  // +-20 %, the same for every call: jobs that failed together do not come back together.
  const uint64_t part = Rng(job, "state.backoff").BelowAt(n, 4001);
  return plain * (8000 + static_cast<int64_t>(part)) / 10000;
}

}  // namespace heddle::state
