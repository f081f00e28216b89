#include "model/inference/generate.h"

#include <ATen/core/Tensor.h>

#include <algorithm>

#include "model/inference/decoder.h"

namespace heddle::inference {
namespace {

Status CheckPrompts(std::span<const Prompt> prompts, const GenerateOptions& options) {
  RETURN_IF_ERROR(CheckSampling(options.sampling));
  if (options.max_new_tokens < 0) return InvalidArgument("max-new-tokens: must be >= 0");
  if (options.max_length < 0) return InvalidArgument("max-length: must be >= 0");
  for (size_t i = 0; i < prompts.size(); ++i) {
    const int64_t length = static_cast<int64_t>(prompts[i].ids.size());
    if (length == 0) return InvalidArgument(Str("prompt ", i, ": no token"));
    if (options.max_length > 0 && length >= options.max_length) {
      return InvalidArgument(Str("prompt ", i, ": ", length, " tokens leave no room for more: ",
                                 "a sequence holds at most ", options.max_length));
    }
  }
  return OkStatus();
}

// Sequences of the prompts that still run; closes what is left.
class Running {
 public:
  explicit Running(Decoder* decoder) : decoder_(decoder) {}
  ~Running() {
    for (const Entry& entry : entries_) decoder_->Close(entry.sequence);
  }
  Running(const Running&) = delete;
  Running& operator=(const Running&) = delete;

  struct Entry {
    size_t prompt = 0;
    SequenceId sequence = 0;
  };
  void Open(size_t prompt, int64_t reserve) {
    entries_.push_back({prompt, decoder_->Open(reserve)});
  }
  // Closes the entries that ended.
  void Close(const std::vector<bool>& ended) {
    std::vector<Entry> left;
    for (size_t i = 0; i < entries_.size(); ++i) {
      if (ended[i]) {
        decoder_->Close(entries_[i].sequence);
      } else {
        left.push_back(entries_[i]);
      }
    }
    entries_ = std::move(left);
  }
  const std::vector<Entry>& entries() const { return entries_; }

 private:
  Decoder* decoder_;
  std::vector<Entry> entries_;
};

// Whether a sequence ends with its newest token.
bool Ends(const GenerateOptions& options, int64_t prompt_length, Generated* made) {
  const int64_t count = static_cast<int64_t>(made->ids.size());
  if (std::find(options.eos.begin(), options.eos.end(), made->ids.back()) != options.eos.end()) {
    made->finish = Finish::kEos;
  } else if (count >= options.max_new_tokens) {
    made->finish = Finish::kMaxNewTokens;
  } else if (options.max_length > 0 && prompt_length + count >= options.max_length) {
    made->finish = Finish::kMaxLength;
  } else {
    return false;
  }
  return true;
}

}  // namespace

StatusOr<std::vector<Generated>> Generate(Decoder* decoder, std::span<const Prompt> prompts,
                                          const GenerateOptions& options, const OnToken& on_token) {
  RETURN_IF_ERROR(CheckPrompts(prompts, options));
  std::vector<Generated> made(prompts.size());
  if (options.max_new_tokens == 0 || prompts.empty()) return made;
  Running running(decoder);
  std::vector<Turn> turns;
  for (size_t i = 0; i < prompts.size(); ++i) {
    const int64_t length = static_cast<int64_t>(prompts[i].ids.size());
    const int64_t most = length + options.max_new_tokens;
    running.Open(i, options.max_length > 0 ? std::min(most, options.max_length) : most);
    turns.push_back({running.entries().back().sequence, prompts[i].ids});
  }
  while (!turns.empty()) {
    ASSIGN_OR_RETURN(const at::Tensor logits, decoder->Feed(turns));
    const at::Tensor narrow = logits.to(at::kFloat).contiguous();
    const size_t vocabulary = static_cast<size_t>(narrow.size(1));
    std::vector<bool> ended;
    for (size_t i = 0; i < turns.size(); ++i) {
      const Running::Entry& entry = running.entries()[i];
      const Draw draw{prompts[entry.prompt].stream, decoder->length(entry.sequence)};
      const std::span<const float> row(narrow.const_data_ptr<float>() + i * vocabulary, vocabulary);
      ASSIGN_OR_RETURN(const int64_t token, SampleToken(row, options.sampling, draw));
      Generated* sequence = &made[entry.prompt];
      sequence->ids.push_back(token);
      if (on_token) on_token(entry.prompt, token);
      ended.push_back(
          Ends(options, static_cast<int64_t>(prompts[entry.prompt].ids.size()), sequence));
      if (ended.back()) sequence->cache_bytes = decoder->cache_bytes(entry.sequence);
    }
    running.Close(ended);
    turns.clear();
    for (const Running::Entry& entry : running.entries()) {
      const std::vector<int64_t>& ids = made[entry.prompt].ids;
      turns.push_back({entry.sequence, std::span(ids).last(1)});
    }
  }
  return made;
}

}  // namespace heddle::inference
