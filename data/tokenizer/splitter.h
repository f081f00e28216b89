// Pre-tokenizers: cut a text into the words within which BPE merges. Regular expressions run on
// PCRE2 with JIT, with `\s` rewritten to Unicode's White_Space so that results equal the
// reference's (formats.md F20).
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "base/status/status.h"

namespace heddle::tokenizer {

// The pattern of GPT-2 and of the ByteLevel pre-tokenizer with use_regex.
inline constexpr char kGpt2Pattern[] =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

// A half-open byte range of a text.
struct Range {
  size_t begin = 0;
  size_t end = 0;
};

// `pattern` with \s and \S as explicit character sets. INVALID_ARGUMENT for \S inside a class and
// for \w, \W, \b and \B, whose meaning differs between engines.
StatusOr<std::string> RewriteWhitespaceClasses(std::string_view pattern);

// A compiled pattern; immutable and thread-safe.
class SplitPattern {
 public:
  // INVALID_ARGUMENT with the offset in `pattern` when it does not compile.
  static StatusOr<std::unique_ptr<SplitPattern>> Compile(std::string_view pattern);
  ~SplitPattern();
  SplitPattern(const SplitPattern&) = delete;
  SplitPattern& operator=(const SplitPattern&) = delete;

 private:
  friend class Matcher;
  struct Code;
  explicit SplitPattern(std::unique_ptr<Code> code);
  std::unique_ptr<Code> code_;
};

// One thread's matching state for a pattern, which must outlive it.
class Matcher {
 public:
  explicit Matcher(const SplitPattern& pattern);
  ~Matcher();
  Matcher(Matcher&&) noexcept;
  Matcher& operator=(Matcher&&) = delete;

  // The first match that begins at or after `from`; an empty range at text.size() when there is
  // none. RESOURCE_EXHAUSTED when the pattern backtracks beyond the limit. REQUIRES: valid UTF-8.
  StatusOr<Range> Find(std::string_view text, size_t from);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// What becomes of the text between matches.
enum class Gaps { kKeep, kDrop };

// One step of a chain: every range is cut into its matches and, unless dropped, what lies between.
struct SplitStep {
  std::unique_ptr<SplitPattern> pattern;
  Gaps gaps = Gaps::kKeep;
};

// One thread's state for a chain of steps, which must outlive it.
class Splitter {
 public:
  explicit Splitter(const std::vector<SplitStep>& steps);

  // Cuts text[begin, end) and appends the words' ranges (offsets in `text`). Matching sees only the
  // range, not the text around it. Without steps the range itself is the one word. Errors as
  // Matcher::Find.
  Status Split(std::string_view text, Range range, std::vector<Range>* words);

 private:
  Status RunStep(size_t step, std::string_view text, Range range, std::vector<Range>* out);

  const std::vector<SplitStep>& steps_;
  std::vector<Matcher> matchers_;
  std::vector<std::vector<Range>> scratch_;
};

}  // namespace heddle::tokenizer
