#include "base/ids/ids.h"

#include <algorithm>
#include <array>
#include <charconv>

namespace heddle {

namespace {

constexpr std::string_view kAlphabet = "0123456789abcdefghjkmnpqrstvwxyz";
constexpr size_t kDigits = 13;  // 65 bits; the first digit is below 16
constexpr int kSequenceBits = 13;
constexpr int kGeneratorBits = 10;
constexpr uint64_t kMaxSequence = (uint64_t{1} << kSequenceBits) - 1;

// The value of one digit, or 32 for anything else.
uint32_t DigitValue(char c) {
  if (c >= 'A' && c <= 'Z') {
    c = static_cast<char>(c - 'A' + 'a');
  }
  if (c == 'o') {
    c = '0';
  }
  if (c == 'i' || c == 'l') {
    c = '1';
  }
  const size_t position = kAlphabet.find(c);
  return position == std::string_view::npos ? 32 : static_cast<uint32_t>(position);
}

bool HasPrefix(std::string_view text, char letter) {
  return text.size() >= 2 && (text[0] | 0x20) == letter && text[1] == '-';
}

StatusOr<uint64_t> ParsePrefixed(std::string_view text, char letter, std::string_view what) {
  if (HasPrefix(text, letter)) {
    if (const std::optional<uint64_t> value = DecodeBase32(text.substr(2)); value.has_value()) {
      return *value;
    }
  }
  return InvalidArgument(Str("\"", text, "\" is not a ", what, " (", letter, "- and 13 digits)"));
}

}  // namespace

Fence Fence::Make(Term term, uint64_t sequence) {
  HEDDLE_CHECK(term.value < (uint32_t{1} << 24), "term ", term.value);
  HEDDLE_CHECK(sequence < (uint64_t{1} << kSequenceBits), "sequence ", sequence);
  return Fence{(uint64_t{term.value} << kSequenceBits) | sequence};
}

std::string EncodeBase32(uint64_t value) {
  std::string text(kDigits, '0');
  for (size_t i = kDigits; i > 0; --i) {
    text[i - 1] = kAlphabet[value & 31];
    value >>= 5;
  }
  return text;
}

std::optional<uint64_t> DecodeBase32(std::string_view text) {
  if (text.size() != kDigits || DigitValue(text[0]) > 15) {
    return std::nullopt;
  }
  uint64_t value = 0;
  for (const char c : text) {
    const uint32_t digit = DigitValue(c);
    if (digit > 31) {
      return std::nullopt;
    }
    value = (value << 5) | digit;
  }
  return value;
}

std::string ToText(JobId id) { return "j-" + EncodeBase32(id.value); }
std::string ToText(Fence fence) { return std::to_string(fence.value); }
std::string ToText(Term term) { return std::to_string(term.value); }
std::string ToText(AttemptId id) { return Str(ToText(id.job), "#", id.number); }
std::string ToText(NodeId id) { return "n-" + EncodeBase32(id.value); }
std::string ToText(CheckpointId id) { return Str(ToText(id.job), "@", id.step); }

StatusOr<JobId> ParseJobId(std::string_view text) {
  ASSIGN_OR_RETURN(const uint64_t value, ParsePrefixed(text, 'j', "job id"));
  return JobId{value};
}

StatusOr<NodeId> ParseNodeId(std::string_view text) {
  ASSIGN_OR_RETURN(const uint64_t value, ParsePrefixed(text, 'n', "node id"));
  return NodeId{value};
}

StatusOr<Fence> ParseFence(std::string_view text) {
  uint64_t value = 0;
  const std::from_chars_result end = std::from_chars(text.data(), text.data() + text.size(), value);
  if (end.ec != std::errc() || end.ptr != text.data() + text.size() || text.empty()) {
    return InvalidArgument(Str("\"", text, "\" is not a fence (a decimal number)"));
  }
  return Fence{value};
}

StatusOr<JobId> ResolveJobPrefix(std::string_view text, const std::vector<JobId>& known) {
  const std::string_view digits = HasPrefix(text, 'j') ? text.substr(2) : text;
  if (digits.empty() || digits.size() > kDigits) {
    return InvalidArgument(Str("\"", text, "\" is not a job id or the start of one"));
  }
  std::vector<JobId> matches;
  for (const JobId id : known) {
    const std::string full = EncodeBase32(id.value);
    const bool match = std::equal(digits.begin(), digits.end(), full.begin(), [](char a, char b) {
      return DigitValue(a) == DigitValue(b) && DigitValue(a) < 32;
    });
    if (match) {
      matches.push_back(id);
    }
  }
  if (matches.empty()) {
    return NotFound(Str("no job ", text));
  }
  if (matches.size() > 1) {
    std::sort(matches.begin(), matches.end());
    std::string names;
    for (size_t i = 0; i < std::min<size_t>(matches.size(), 3); ++i) {
      names += Str(i == 0 ? "" : ", ", matches[i]);
    }
    return InvalidArgument(Str("\"", text, "\" is the start of ", matches.size(), " jobs: ", names,
                               matches.size() > 3 ? ", .." : ""));
  }
  return matches[0];
}

JobIdGenerator::JobIdGenerator(uint32_t generator, JobId last) : generator_(generator) {
  HEDDLE_CHECK(generator < (uint32_t{1} << kGeneratorBits), "generator ", generator);
  last_ms_ = last.value >> (kSequenceBits + kGeneratorBits);
  sequence_ = last.value & kMaxSequence;
}

JobId JobIdGenerator::Next(int64_t wall_ms) {
  const uint64_t ms = static_cast<uint64_t>(std::max<int64_t>(wall_ms - kIdEpochMs, 0));
  if (ms > last_ms_) {
    last_ms_ = ms;
    sequence_ = 0;
  } else if (++sequence_ > kMaxSequence) {
    ++last_ms_;
    sequence_ = 0;
  }
  return JobId{(last_ms_ << (kSequenceBits + kGeneratorBits)) | (generator_ << kSequenceBits) |
               sequence_};
}

}  // namespace heddle
