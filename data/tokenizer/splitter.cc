#include "data/tokenizer/splitter.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>

namespace heddle::tokenizer {
namespace {

constexpr uint32_t kMatchLimit = 20'000'000;
constexpr size_t kJitStackBytesMax = 8 << 20;
constexpr size_t kPatternBytesMax = 1 << 16;
constexpr char kWhiteSpace[] =
    R"(\x{9}-\x{d}\x{20}\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000})";

std::string PcreMessage(int code) {
  PCRE2_UCHAR8 text[256];
  pcre2_get_error_message_8(code, text, sizeof(text));
  return std::string(reinterpret_cast<const char*>(text));
}

}  // namespace

StatusOr<std::string> RewriteWhitespaceClasses(std::string_view pattern) {
  std::string out;
  bool in_class = false;
  size_t class_begin = 0;
  for (size_t i = 0; i < pattern.size(); ++i) {
    const char c = pattern[i];
    if (c != '\\' || i + 1 >= pattern.size()) {
      const bool closes_empty_class = c == ']' && in_class && class_begin + 1 == i;
      const bool intersection = c == '&' && in_class && pattern.substr(i, 2) == "&&";
      if ((c == '[' && in_class) || closes_empty_class || intersection) {
        return InvalidArgument(Str("pattern offset ", i, ": nested classes are not supported"));
      }
      if (c == '[') {
        in_class = true;
        class_begin = pattern.substr(i + 1, 1) == "^" ? i + 1 : i;
      }
      if (c == ']') in_class = false;
      out.push_back(c);
      continue;
    }
    const char escaped = pattern[++i];
    if (escaped == 's') {
      out += in_class ? std::string(kWhiteSpace) : Str("[", kWhiteSpace, "]");
    } else if (escaped == 'S' && !in_class) {
      out += Str("[^", kWhiteSpace, "]");
    } else if (std::string_view("SwWbB").find(escaped) != std::string_view::npos) {
      return InvalidArgument(Str("pattern uses \\", escaped, in_class ? " in a class" : "",
                                 ", which is not supported"));
    } else {
      out.push_back('\\');
      out.push_back(escaped);
    }
  }
  return out;
}

struct SplitPattern::Code {
  ~Code() { pcre2_code_free_8(code); }
  pcre2_code_8* code = nullptr;
  bool jit = false;
};

SplitPattern::SplitPattern(std::unique_ptr<Code> code) : code_(std::move(code)) {}
SplitPattern::~SplitPattern() = default;

StatusOr<std::unique_ptr<SplitPattern>> SplitPattern::Compile(std::string_view pattern) {
  if (pattern.size() > kPatternBytesMax) return InvalidArgument("pattern longer than 64 KiB");
  ASSIGN_OR_RETURN(const std::string rewritten, RewriteWhitespaceClasses(pattern));
  int error = 0;
  PCRE2_SIZE offset = 0;
  auto code = std::make_unique<Code>();
  code->code =
      pcre2_compile_8(reinterpret_cast<PCRE2_SPTR8>(rewritten.data()), rewritten.size(),
                      PCRE2_UTF | PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C, &error, &offset, nullptr);
  if (code->code == nullptr) {
    return InvalidArgument(
        Str("pattern '", rewritten, "': ", PcreMessage(error), " at offset ", offset));
  }
  // Where memory may not be made executable PCRE2 interprets: slower, same results.
  code->jit = pcre2_jit_compile_8(code->code, PCRE2_JIT_COMPLETE) == 0;
  return std::unique_ptr<SplitPattern>(new SplitPattern(std::move(code)));
}

struct Matcher::State {
  explicit State(const SplitPattern::Code& compiled)
      : code(compiled.code),
        jit(compiled.jit),
        data(pcre2_match_data_create_from_pattern_8(compiled.code, nullptr)),
        context(pcre2_match_context_create_8(nullptr)),
        stack(pcre2_jit_stack_create_8(32 << 10, kJitStackBytesMax, nullptr)) {
    HEDDLE_CHECK(data != nullptr && context != nullptr && stack != nullptr, "out of memory");
    pcre2_set_match_limit_8(context, kMatchLimit);
    pcre2_jit_stack_assign_8(context, nullptr, stack);
  }
  ~State() {
    pcre2_match_data_free_8(data);
    pcre2_match_context_free_8(context);
    pcre2_jit_stack_free_8(stack);
  }
  const pcre2_code_8* code;
  bool jit;
  pcre2_match_data_8* data;
  pcre2_match_context_8* context;
  pcre2_jit_stack_8* stack;
};

Matcher::Matcher(const SplitPattern& pattern) : state_(std::make_unique<State>(*pattern.code_)) {}
Matcher::~Matcher() = default;
Matcher::Matcher(Matcher&&) noexcept = default;

StatusOr<Range> Matcher::Find(std::string_view text, size_t from) {
  const auto* subject = reinterpret_cast<PCRE2_SPTR8>(text.data());
  const int found = state_->jit ? pcre2_jit_match_8(state_->code, subject, text.size(), from, 0,
                                                    state_->data, state_->context)
                                : pcre2_match_8(state_->code, subject, text.size(), from,
                                                PCRE2_NO_UTF_CHECK, state_->data, state_->context);
  if (found == PCRE2_ERROR_NOMATCH) return Range{text.size(), text.size()};
  if (found < 0) {
    return ResourceExhausted(
        Str("pre-tokenizer pattern gave up at byte ", from, ": ", PcreMessage(found)));
  }
  const PCRE2_SIZE* bounds = pcre2_get_ovector_pointer_8(state_->data);
  // \K can put the beginning behind the end.
  return Range{std::min(bounds[0], bounds[1]), bounds[1]};
}

Splitter::Splitter(const std::vector<SplitStep>& steps) : steps_(steps) {
  for (const SplitStep& step : steps) matchers_.emplace_back(*step.pattern);
  scratch_.resize(2);
}

Status Splitter::RunStep(size_t step, std::string_view text, Range range, std::vector<Range>* out) {
  const std::string_view part = text.substr(range.begin, range.end - range.begin);
  const bool keep_gaps = steps_[step].gaps == Gaps::kKeep;
  size_t done = 0;    // up to here everything is emitted or dropped
  size_t search = 0;  // empty matches move only this
  while (search < part.size()) {
    ASSIGN_OR_RETURN(const Range match, matchers_[step].Find(part, search));
    if (match.begin >= part.size()) break;
    if (match.end == match.begin) {
      search = match.end + 1;
      while (search < part.size() && (static_cast<unsigned char>(part[search]) & 0xC0) == 0x80) {
        ++search;
      }
      continue;
    }
    if (match.begin > done && keep_gaps) {
      out->push_back({range.begin + done, range.begin + match.begin});
    }
    out->push_back({range.begin + match.begin, range.begin + match.end});
    done = search = match.end;
  }
  if (done < part.size() && keep_gaps) out->push_back({range.begin + done, range.end});
  return OkStatus();
}

Status Splitter::Split(std::string_view text, Range range, std::vector<Range>* words) {
  if (range.begin == range.end) return OkStatus();
  if (steps_.empty()) {
    words->push_back(range);
    return OkStatus();
  }
  if (steps_.size() == 1) return RunStep(0, text, range, words);
  std::vector<Range>& from = scratch_[0];
  std::vector<Range>& to = scratch_[1];
  from.assign(1, range);
  for (size_t step = 0; step < steps_.size(); ++step) {
    to.clear();
    for (const Range& part : from) RETURN_IF_ERROR(RunStep(step, text, part, &to));
    std::swap(from, to);
  }
  words->insert(words->end(), from.begin(), from.end());
  return OkStatus();
}

}  // namespace heddle::tokenizer
