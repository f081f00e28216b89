#include "data/tokenizer/bpe_trainer.h"

#include <algorithm>
#include <charconv>
#include <nlohmann/json.hpp>
#include <queue>
#include <string>
#include <unordered_map>
#include <utility>

#include "data/text/utf8.h"
#include "data/tokenizer/byte_alphabet.h"
#include "data/tokenizer/splitter.h"
#include "data/tokenizer/word_cache.h"

namespace heddle::tokenizer {
namespace {

constexpr uint32_t kVocabularyMax = 1 << 24;

struct StringHash {
  using is_transparent = void;
  size_t operator()(std::string_view text) const { return std::hash<std::string_view>{}(text); }
};
using WordCounts = std::unordered_map<std::string, int64_t, StringHash, std::equal_to<>>;

struct Word {
  std::vector<uint32_t> symbols;
  int64_t count = 0;
};

uint64_t PairKey(uint32_t left, uint32_t right) {
  return (static_cast<uint64_t>(left) << 32) | right;
}

// What is known of an adjacent pair of symbols.
struct Pair {
  int64_t count = 0;
  std::vector<uint32_t> words;  // that held it at some time; may repeat
};

// A pair and a count it had; never lower than the count it has.
struct Ranked {
  int64_t count;
  uint64_t key;
  bool operator<(const Ranked& other) const {  // max-heap: high count, then small key
    return count != other.count ? count < other.count : key > other.key;
  }
};

// Learns merges over distinct words with incremental pair counts. Symbols are token ids.
class MergeLearner {
 public:
  explicit MergeLearner(std::vector<Word> words) : words_(std::move(words)) {
    for (uint32_t w = 0; w < words_.size(); ++w) {
      const std::vector<uint32_t>& symbols = words_[w].symbols;
      for (size_t i = 0; i + 1 < symbols.size(); ++i) {
        Change(PairKey(symbols[i], symbols[i + 1]), words_[w].count, w);
      }
    }
    for (const auto& [key, pair] : pairs_) queue_.push({pair.count, key});
    changed_.clear();
  }

  // The most frequent pair, ties to the smaller; a count below `min_frequency` or nothing left:
  // count 0.
  Ranked Best(int64_t min_frequency) {
    while (!queue_.empty()) {
      const Ranked top = queue_.top();
      queue_.pop();
      const auto it = pairs_.find(top.key);
      const int64_t count = it == pairs_.end() ? 0 : it->second.count;
      if (count != top.count) {
        if (count > 0 && count < top.count) queue_.push({count, top.key});
        continue;
      }
      if (count < std::max<int64_t>(min_frequency, 1)) break;
      return top;
    }
    return {0, 0};
  }

  // Replaces the pair by `merged` everywhere.
  void Merge(uint64_t key, uint32_t merged) {
    const auto it = pairs_.find(key);
    std::vector<uint32_t> places = std::move(it->second.words);
    std::sort(places.begin(), places.end());
    places.erase(std::unique(places.begin(), places.end()), places.end());
    changed_.clear();
    for (const uint32_t w : places) {
      MergeInWord(w, static_cast<uint32_t>(key >> 32), static_cast<uint32_t>(key), merged);
    }
    pairs_.erase(key);
    for (const uint64_t grown : changed_) {
      const auto found = pairs_.find(grown);
      if (found != pairs_.end() && found->second.count > 0) {
        queue_.push({found->second.count, grown});
      }
    }
  }

 private:
  void Change(uint64_t key, int64_t by, uint32_t word) {
    Pair& pair = pairs_[key];
    pair.count += by;
    if (by > 0) {
      if (pair.words.empty() || pair.words.back() != word) pair.words.push_back(word);
      changed_.push_back(key);
    }
  }

  void MergeInWord(uint32_t w, uint32_t left, uint32_t right, uint32_t merged) {
    std::vector<uint32_t>& symbols = words_[w].symbols;
    const int64_t count = words_[w].count;
    size_t out = 0;
    for (size_t i = 0; i < symbols.size(); ++i) {
      if (i + 1 < symbols.size() && symbols[i] == left && symbols[i + 1] == right) {
        if (out > 0) {
          Change(PairKey(symbols[out - 1], left), -count, w);
          Change(PairKey(symbols[out - 1], merged), count, w);
        }
        if (i + 2 < symbols.size()) {
          Change(PairKey(right, symbols[i + 2]), -count, w);
          Change(PairKey(merged, symbols[i + 2]), count, w);
        }
        symbols[out++] = merged;
        ++i;
      } else {
        symbols[out++] = symbols[i];
      }
    }
    symbols.resize(out);
  }

  std::vector<Word> words_;
  std::unordered_map<uint64_t, Pair> pairs_;
  std::priority_queue<Ranked> queue_;
  std::vector<uint64_t> changed_;  // pairs that became more frequent since last cleared
};

// The vocabulary as it grows: spellings by id.
struct Vocabulary {
  std::vector<std::string> text_of;
  std::unordered_map<std::string, uint32_t> id_of;
  std::vector<std::pair<uint32_t, uint32_t>> merges;

  uint32_t Add(const std::string& text) {
    const auto [it, fresh] = id_of.emplace(text, static_cast<uint32_t>(text_of.size()));
    if (fresh) text_of.push_back(text);
    return it->second;
  }
};

std::string WriteJson(const Vocabulary& vocabulary, const std::vector<std::string>& special) {
  using nlohmann::ordered_json;
  ordered_json root;
  root["version"] = "1.0";
  root["truncation"] = nullptr;
  root["padding"] = nullptr;
  root["added_tokens"] = ordered_json::array();
  for (const std::string& token : special) {
    root["added_tokens"].push_back({{"id", vocabulary.id_of.at(token)},
                                    {"content", token},
                                    {"single_word", false},
                                    {"lstrip", false},
                                    {"rstrip", false},
                                    {"normalized", false},
                                    {"special", true}});
  }
  root["normalizer"] = nullptr;
  root["pre_tokenizer"] = {{"type", "ByteLevel"},
                           {"add_prefix_space", false},
                           {"trim_offsets", true},
                           {"use_regex", true}};
  root["post_processor"] = nullptr;
  root["decoder"] = {{"type", "ByteLevel"},
                     {"add_prefix_space", true},
                     {"trim_offsets", true},
                     {"use_regex", true}};
  ordered_json model;
  model["type"] = "BPE";
  for (const char* absent :
       {"dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"}) {
    model[absent] = nullptr;
  }
  for (const char* off : {"fuse_unk", "byte_fallback", "ignore_merges"}) model[off] = false;
  root["model"] = std::move(model);
  // An ordered_json object finds keys by linear search: write the two long members by hand.
  std::string text = root.dump(1);
  std::string tail = ",\n  \"vocab\": {";
  for (size_t id = 0; id < vocabulary.text_of.size(); ++id) {
    tail +=
        Str(id == 0 ? "\n   " : ",\n   ", nlohmann::json(vocabulary.text_of[id]).dump(), ": ", id);
  }
  tail += "\n  },\n  \"merges\": [";
  for (size_t i = 0; i < vocabulary.merges.size(); ++i) {
    const auto [left, right] = vocabulary.merges[i];
    tail += Str(i == 0 ? "\n   " : ",\n   ",
                nlohmann::json(vocabulary.text_of[left] + " " + vocabulary.text_of[right]).dump());
  }
  tail += vocabulary.merges.empty() ? "]" : "\n  ]";
  const std::string end = "\n }\n}";  // closes model and root
  HEDDLE_CHECK(text.ends_with(end));
  text.insert(text.size() - end.size(), tail);
  return text + "\n";
}

}  // namespace

struct BpeTrainer::Impl {
  BpeTrainerOptions options;
  std::vector<SplitStep> steps;
  std::unique_ptr<Splitter> splitter;
  std::vector<Range> ranges;
  WordCounts counts;
};

BpeTrainer::BpeTrainer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
BpeTrainer::~BpeTrainer() = default;

StatusOr<std::unique_ptr<BpeTrainer>> BpeTrainer::Create(const BpeTrainerOptions& options) {
  const size_t least = 256 + options.special_tokens.size();
  if (options.vocab_size < least || options.vocab_size > kVocabularyMax) {
    return InvalidArgument(Str("tokenizer vocabulary of ", options.vocab_size, ": must be in [",
                               least, ", ", kVocabularyMax, "]"));
  }
  auto impl = std::make_unique<Impl>();
  impl->options = options;
  impl->steps.resize(1);
  ASSIGN_OR_RETURN(impl->steps[0].pattern, SplitPattern::Compile(kGpt2Pattern));
  impl->splitter = std::make_unique<Splitter>(impl->steps);
  return std::unique_ptr<BpeTrainer>(new BpeTrainer(std::move(impl)));
}

Status BpeTrainer::Add(std::string_view text) {
  const size_t bad = text::FindInvalidUtf8(text);
  if (bad != std::string_view::npos) {
    return InvalidArgument(Str("byte ", bad, ": not UTF-8 text"));
  }
  impl_->ranges.clear();
  RETURN_IF_ERROR(impl_->splitter->Split(text, {0, text.size()}, &impl_->ranges));
  for (const Range& range : impl_->ranges) {
    const std::string_view word = text.substr(range.begin, range.end - range.begin);
    const auto it = impl_->counts.find(word);
    if (it != impl_->counts.end()) {
      ++it->second;
    } else {
      impl_->counts.emplace(word, 1);
    }
  }
  return OkStatus();
}

StatusOr<std::string> BpeTrainer::Finish(const std::function<void(int64_t, int64_t)>& progress) {
  const BpeTrainerOptions& options = impl_->options;
  if (impl_->counts.empty()) return InvalidArgument("no text to train a tokenizer on");
  Vocabulary vocabulary;
  for (const std::string& token : options.special_tokens) vocabulary.Add(token);
  // The bytes follow in the order of their characters' code points, as in the reference.
  std::vector<std::string> characters;
  for (int byte = 0; byte < 256; ++byte) {
    characters.emplace_back(ByteCharacter(static_cast<unsigned char>(byte)));
  }
  std::sort(characters.begin(), characters.end());  // UTF-8 order is code point order
  for (const std::string& character : characters) vocabulary.Add(character);
  uint32_t byte_id[256];
  for (int byte = 0; byte < 256; ++byte) {
    byte_id[byte] =
        vocabulary.id_of.at(std::string(ByteCharacter(static_cast<unsigned char>(byte))));
  }
  std::vector<Word> words;
  words.reserve(impl_->counts.size());
  for (const auto& [text, count] : impl_->counts) {
    Word word;
    word.count = count;
    for (const char byte : text) word.symbols.push_back(byte_id[static_cast<unsigned char>(byte)]);
    words.push_back(std::move(word));
  }
  impl_->counts = WordCounts();
  MergeLearner learner(std::move(words));
  const int64_t wanted = options.vocab_size - static_cast<int64_t>(vocabulary.text_of.size());
  while (vocabulary.text_of.size() < options.vocab_size) {
    const Ranked best = learner.Best(options.min_frequency);
    if (best.count == 0) break;
    const auto left = static_cast<uint32_t>(best.key >> 32);
    const auto right = static_cast<uint32_t>(best.key);
    const uint32_t merged = vocabulary.Add(vocabulary.text_of[left] + vocabulary.text_of[right]);
    vocabulary.merges.emplace_back(left, right);
    learner.Merge(best.key, merged);
    if (progress && vocabulary.merges.size() % 64 == 0) {
      progress(static_cast<int64_t>(vocabulary.merges.size()), wanted);
    }
  }
  return WriteJson(vocabulary, options.special_tokens);
}

StatusOr<uint32_t> ParseBpeSpec(std::string_view spec) {
  constexpr std::string_view kPrefix = "bpe:";
  if (!spec.starts_with(kPrefix)) return NotFound(Str("'", spec, "' does not begin with bpe:"));
  const std::string_view digits = spec.substr(kPrefix.size());
  uint32_t size = 0;
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), size);
  if (error != std::errc() || end != digits.data() + digits.size() || size < 257 ||
      size > kVocabularyMax) {
    return InvalidArgument(
        Str("tokenizer '", spec, "': SIZE must be a number in [257, ", kVocabularyMax, "]"));
  }
  return size;
}

}  // namespace heddle::tokenizer
