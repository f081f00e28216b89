#include "data/pack/prepare.h"

#include <sys/stat.h>

#include <algorithm>
#include <filesystem>
#include <memory>
#include <optional>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "base/clock/clock.h"
#include "data/pack/checksum.h"
#include "data/pack/dataset.h"
#include "data/pack/encode_pool.h"
#include "data/pack/files.h"
#include "data/pack/journal.h"
#include "data/pack/manifest.h"
#include "data/pack/shard_writer.h"
#include "data/tokenizer/bpe_trainer.h"
#include "data/tokenizer/tokenizer.h"

namespace heddle::pack {
namespace {

constexpr int64_t kBatchBytes = 1 << 20;
constexpr double kProgressSeconds = 0.1;
constexpr char kTokenizerName[] = "tokenizer.json";
constexpr char kEvalFolder[] = "eval";
constexpr int kThreadsMax = 256;

std::string BaseName(std::string path) {
  while (path.size() > 1 && path.back() == '/') path.pop_back();
  const size_t slash = path.rfind('/');
  return slash == std::string::npos ? path : path.substr(slash + 1);
}

// Changes whenever the bytes to write may change, and for an edited source even of equal size.
std::string Fingerprint(const PrepareOptions& options, const text::SourceListing& listing,
                        const std::string& tokenizer_identity) {
  Xxh3Stream stream;
  const auto add = [&stream](const std::string& field) {
    stream.Update(Str(field.size(), ":", field));
  };
  add(Str("packer 1, manifest ", kManifestVersion));
  add(tokenizer_identity);
  add(Str(options.eval_fraction, " ", options.seed, " ", options.shard_tokens_max, " ",
          options.tokenizer_bytes_max, " ", options.source.document_bytes_max));
  add(options.source.jsonl_key);
  for (const std::string& input : options.source.inputs) add(BaseName(input));
  for (const text::SourceFile& file : listing.files) {
    struct stat info = {};
    ::stat(file.path.c_str(), &info);
    add(file.key);
    add(Str(file.bytes, " ", static_cast<int64_t>(info.st_mtim.tv_sec), " ",
            static_cast<int64_t>(info.st_mtim.tv_nsec)));
  }
  return stream.Hex();
}

// Tells the caller how far a phase is, at most ten times a second.
class ProgressMeter {
 public:
  ProgressMeter(const PrepareOptions& options, const char* phase) : options_(options) {
    progress_.phase = phase;
    start_ns_ = clock_.NowSteady();
  }

  // ABORTED when the caller wants to stop.
  Status Update(int64_t done, int64_t total, int64_t documents, int64_t tokens, bool last = false) {
    if (options_.cancelled && options_.cancelled()) {
      return Aborted("preparation cancelled; the same command goes on where it stopped");
    }
    if (!options_.progress) return OkStatus();
    const double now = static_cast<double>(clock_.NowSteady() - start_ns_) * 1e-9;
    if (!last && now - shown_ < kProgressSeconds) return OkStatus();
    shown_ = now;
    progress_.bytes_done = done;
    progress_.bytes_total = total;
    progress_.documents = documents;
    progress_.tokens = tokens;
    const double rate = now > 0 ? static_cast<double>(done) / now : 0;
    progress_.megabytes_per_second = rate / 1e6;
    progress_.eta_seconds =
        rate > 0 ? static_cast<double>(std::max<int64_t>(total - done, 0)) / rate : 0;
    options_.progress(progress_);
    return OkStatus();
  }

 private:
  const PrepareOptions& options_;
  SystemClock clock_;
  PrepareProgress progress_;
  int64_t start_ns_ = 0;
  double shown_ = -1;
};

StatusOr<std::string> TrainTokenizer(const PrepareOptions& options, uint32_t size,
                                     const text::SourceListing& listing) {
  tokenizer::BpeTrainerOptions trainer_options;
  trainer_options.vocab_size = size;
  ASSIGN_OR_RETURN(const std::unique_ptr<tokenizer::BpeTrainer> trainer,
                   tokenizer::BpeTrainer::Create(trainer_options));
  text::DocumentReader reader(listing, options.source);
  ProgressMeter meter(options, "tokenizer");
  const int64_t total = std::min(listing.bytes, options.tokenizer_bytes_max);
  int64_t bytes = 0;
  int64_t documents = 0;
  while (bytes < options.tokenizer_bytes_max) {
    ASSIGN_OR_RETURN(const std::optional<text::Document> document, reader.Next());
    if (!document.has_value()) break;
    RETURN_IF_ERROR(trainer->Add(document->text));
    bytes += static_cast<int64_t>(document->text.size());
    RETURN_IF_ERROR(meter.Update(bytes, total, ++documents, 0));
  }
  ProgressMeter merges(options, "merges");
  return trainer->Finish([&merges](int64_t done, int64_t wanted) {
    // Cancelling waits for the end of this phase, which takes seconds.
    (void)merges.Update(done, wanted, 0, 0);
  });
}

class Preparation {
 public:
  explicit Preparation(const PrepareOptions& options) : options_(options) {}

  StatusOr<PrepareReport> Run() {
    const int64_t start_ns = clock_.NowSteady();
    RETURN_IF_ERROR(CheckOptions());
    // Its own output is no source, where it lies inside an input.
    text::SourceOptions source = options_.source;
    source.exclude.push_back(options_.out);
    ASSIGN_OR_RETURN(listing_, text::ListFiles(source));
    std::unique_ptr<tokenizer::Tokenizer> given;
    std::string identity = options_.tokenizer;
    if (bpe_size_ == 0) {
      ASSIGN_OR_RETURN(given, tokenizer::Tokenizer::Load(options_.tokenizer));
      RETURN_IF_ERROR(CheckTokenizer(*given));
      identity = given->sha256();
    }
    ASSIGN_OR_RETURN(const std::unique_ptr<FolderLock> lock, OpenFolder(identity));
    if (journal_.complete) return ReportComplete();
    RETURN_IF_ERROR(MakeTokenizer(std::move(given)));
    ShardHeader header;
    header.vocab_size = tokenizer_->vocab_size();
    header.token_bytes = header.vocab_size <= 65536 ? 2 : 4;
    header.eos_id = *tokenizer_->eos_id();
    header.tokenizer_sha256 = tokenizer_->sha256();
    train_.emplace(options_.out, header, options_.shard_tokens_max, journal_.train);
    eval_.emplace(EvalFolder(), header, options_.shard_tokens_max, journal_.eval);
    report_.shards_reused =
        static_cast<int64_t>(train_->finished().size() + eval_->finished().size());
    RETURN_IF_ERROR(Pack());
    RETURN_IF_ERROR(WriteManifests(header));
    const double seconds = static_cast<double>(clock_.NowSteady() - start_ns) * 1e-9;
    FinishReport(seconds);
    return report_;
  }

 private:
  std::string EvalFolder() const { return Str(options_.out, "/", kEvalFolder); }
  bool has_eval() const { return options_.eval_fraction > 0; }

  Status CheckOptions() {
    if (options_.out.empty()) return InvalidArgument("no output folder given");
    if (options_.tokenizer.empty()) {
      return InvalidArgument("no tokenizer given: a tokenizer.json, or bpe:SIZE");
    }
    if (!(options_.eval_fraction >= 0 && options_.eval_fraction < 1)) {
      return InvalidArgument(
          Str("evaluation share ", options_.eval_fraction, ": must be in [0, 1)"));
    }
    if (options_.shard_tokens_max < 1) {
      return InvalidArgument(Str("shard size ", options_.shard_tokens_max, ": must be > 0"));
    }
    if (options_.tokenizer.starts_with("bpe:")) {
      ASSIGN_OR_RETURN(bpe_size_, tokenizer::ParseBpeSpec(options_.tokenizer));
    }
    return OkStatus();
  }

  static Status CheckTokenizer(const tokenizer::Tokenizer& tokenizer) {
    if (tokenizer.eos_id().has_value()) return OkStatus();
    return InvalidArgument(
        "the tokenizer has no end-of-text token (<|endoftext|>, <|end_of_text|>, </s>, ...)");
  }

  // What a preparation writes before its journal names a shard. Other files are not ours.
  Status RemoveLeftovers() const {
    for (const std::string& dir : {EvalFolder(), options_.out}) {
      std::error_code error;
      std::vector<std::string> ours;
      std::filesystem::directory_iterator entry(dir, error);
      for (; !error && entry != std::filesystem::directory_iterator(); entry.increment(error)) {
        std::string name = entry->path().filename();
        if (name.ends_with(".tmp")) name.resize(name.size() - 4);
        if (name == kTokenizerName || name == kManifestName || IsShardName(name)) {
          ours.push_back(entry->path());
        }
      }
      for (const std::string& path : ours) {
        std::filesystem::remove(path, error);
        if (error) return FromErrno("cannot remove", path, error.value());
      }
    }
    // Goes only if nothing of somebody else is in it.
    std::error_code ignored;
    std::filesystem::remove(EvalFolder(), ignored);
    return OkStatus();
  }

  // Makes or re-opens the output folder and reads the journal.
  StatusOr<std::unique_ptr<FolderLock>> OpenFolder(const std::string& tokenizer_identity) {
    const std::string fingerprint = Fingerprint(options_, listing_, tokenizer_identity);
    std::error_code error;
    std::filesystem::create_directories(options_.out, error);
    if (error) return FromErrno("cannot make folder", options_.out, error.value());
    ASSIGN_OR_RETURN(std::unique_ptr<FolderLock> lock, FolderLock::Take(options_.out));
    ASSIGN_OR_RETURN(std::optional<Journal> journal, ReadJournal(options_.out));
    if (!journal.has_value()) {
      const bool empty = std::filesystem::is_empty(options_.out, error);
      if (error) return FromErrno("cannot list", options_.out, error.value());
      if (!empty) {
        return AlreadyExists(Str(options_.out, ": not empty, and no preparation was begun here"));
      }
      journal_.fingerprint = fingerprint;
      RETURN_IF_ERROR(WriteJournal(options_.out, journal_));
      return lock;
    }
    if (journal->fingerprint != fingerprint) {
      // A call that failed on a bad source before its first shard must not block the repaired one.
      if (!journal->complete && journal->train.empty() && journal->eval.empty()) {
        RETURN_IF_ERROR(RemoveLeftovers());
        journal_.fingerprint = fingerprint;
        RETURN_IF_ERROR(WriteJournal(options_.out, journal_));
        return lock;
      }
      return AlreadyExists(Str(options_.out, ": holds ", journal->complete ? "a" : "an unfinished",
                               " data set of other sources or options; choose another folder, or "
                               "remove this one"));
    }
    journal_ = *std::move(journal);
    return lock;
  }

  Status MakeTokenizer(std::unique_ptr<tokenizer::Tokenizer> given) {
    const std::string path = Str(options_.out, "/", kTokenizerName);
    std::string json;
    if (given != nullptr) {
      json = given->json();
    } else {
      const StatusOr<std::string> trained = ReadFile(path);
      if (trained.ok() && tokenizer::Sha256Hex(*trained) == journal_.tokenizer_sha256) {
        json = *trained;
      } else {
        ASSIGN_OR_RETURN(json, TrainTokenizer(options_, bpe_size_, listing_));
      }
    }
    ASSIGN_OR_RETURN(tokenizer_, tokenizer::Tokenizer::Parse(json, path));
    RETURN_IF_ERROR(WriteFileAtomically(path, json));
    if (has_eval()) {
      std::error_code error;
      std::filesystem::create_directories(EvalFolder(), error);
      if (error) return FromErrno("cannot make folder", EvalFolder(), error.value());
      RETURN_IF_ERROR(WriteFileAtomically(Str(EvalFolder(), "/", kTokenizerName), json));
    }
    if (journal_.tokenizer_sha256 != tokenizer_->sha256()) {
      // Shards of another tokenizer, should a changed one have been trained, do not count.
      journal_.train.clear();
      journal_.eval.clear();
    }
    journal_.tokenizer_sha256 = tokenizer_->sha256();
    return WriteJournal(options_.out, journal_);
  }

  bool IsEval(const std::string& text) const {
    if (!has_eval()) return false;
    // By content, so that equal documents cannot stand on both sides.
    const uint64_t hash = Xxh3(text, options_.seed);
    return static_cast<double>(hash >> 11) * 0x1p-53 < options_.eval_fraction;
  }

  Status Pack() {
    const int cores = static_cast<int>(std::thread::hardware_concurrency());
    const int threads = std::clamp(options_.threads > 0 ? options_.threads : cores, 1, kThreadsMax);
    EncodePool pool(*tokenizer_, threads);
    text::DocumentReader reader(listing_, options_.source);
    ProgressMeter meter(options_, "pack");
    bool more = true;
    while (more || pool.pending() > 0) {
      if (more && pool.pending() < 2 * static_cast<size_t>(threads)) {
        ASSIGN_OR_RETURN(more, SubmitBatch(&reader, &pool));
      } else {
        RETURN_IF_ERROR(Store(*pool.Take()));
      }
      RETURN_IF_ERROR(
          meter.Update(reader.bytes_read(), listing_.bytes, documents_stored_, tokens_stored_));
    }
    RETURN_IF_ERROR(train_->Finish(next_document_));
    RETURN_IF_ERROR(eval_->Finish(next_document_));
    RETURN_IF_ERROR(meter.Update(listing_.bytes, listing_.bytes, documents_stored_, tokens_stored_,
                                 /*last=*/true));
    report_.skipped = listing_.skipped;
    for (const auto& [reason, count] : reader.skipped()) report_.skipped[reason] += count;
    return OkStatus();
  }

  // Reads a batch and hands it to the pool. False at the end of the sources.
  StatusOr<bool> SubmitBatch(text::DocumentReader* reader, EncodePool* pool) {
    auto batch = std::make_unique<EncodeBatch>();
    int64_t bytes = 0;
    bool more = true;
    // Documents of finished shards are read for the digest only; they bound the loop all the same.
    while (bytes < kBatchBytes) {
      ASSIGN_OR_RETURN(std::optional<text::Document> document, reader->Next());
      more = document.has_value();
      if (!more) break;
      bytes += static_cast<int64_t>(document->text.size());
      source_digest_.Update(Str(document->text.size(), ":"));
      source_digest_.Update(document->text);
      const int64_t number = next_document_++;
      const bool eval = IsEval(document->text);
      if (number < (eval ? *eval_ : *train_).next_source_document()) continue;
      batch->names.push_back(std::move(document->name));
      batch->texts.push_back(std::move(document->text));
      batch->numbers.push_back(number);
      batch->tags.push_back(eval);
    }
    if (!batch->texts.empty()) pool->Submit(std::move(batch));
    return more;
  }

  Status Store(const EncodeBatch& batch) {
    RETURN_IF_ERROR(batch.status);
    size_t begin = 0;
    for (size_t i = 0; i < batch.ends.size(); ++i) {
      const std::span<const uint32_t> tokens(batch.tokens.data() + begin, batch.ends[i] - begin);
      begin = batch.ends[i];
      ShardWriter& writer = batch.tags[i] ? *eval_ : *train_;
      ASSIGN_OR_RETURN(const bool wrote, writer.Add(batch.numbers[i], tokens,
                                                    static_cast<int64_t>(batch.texts[i].size())));
      ++documents_stored_;
      tokens_stored_ += static_cast<int64_t>(tokens.size());
      if (!wrote) continue;
      journal_.train = train_->finished();
      journal_.eval = eval_->finished();
      RETURN_IF_ERROR(WriteJournal(options_.out, journal_));
    }
    return OkStatus();
  }

  Manifest DescribeSplit(const char* split, const ShardWriter& writer,
                         const ShardHeader& header) const {
    Manifest manifest;
    manifest.split = split;
    manifest.tokenizer_sha256 = header.tokenizer_sha256;
    manifest.vocab_size = header.vocab_size;
    manifest.eos_id = header.eos_id;
    manifest.token_bytes = static_cast<int>(header.token_bytes);
    manifest.seed = options_.seed;
    manifest.eval_fraction = options_.eval_fraction;
    for (const std::string& input : options_.source.inputs) {
      manifest.sources.push_back(BaseName(input));
    }
    manifest.source_digest = source_digest_.Hex();
    writer.Describe(&manifest);
    return manifest;
  }

  Status WriteManifests(const ShardHeader& header) {
    Manifest train = DescribeSplit("train", *train_, header);
    Manifest eval = DescribeSplit("eval", *eval_, header);
    if (train.documents == 0 || (has_eval() && eval.documents == 0)) {
      return InvalidArgument(Str("no document for the ",
                                 train.documents == 0 ? "training" : "evaluation",
                                 " part: ", train.documents + eval.documents,
                                 " documents in all, evaluation share ", options_.eval_fraction));
    }
    if (has_eval()) {
      RETURN_IF_ERROR(WriteManifest(EvalFolder(), &eval));
      report_.eval = ReportSplit(EvalFolder(), eval);
    }
    RETURN_IF_ERROR(WriteManifest(options_.out, &train));
    report_.train = ReportSplit(options_.out, train);
    journal_.train = train_->finished();
    journal_.eval = eval_->finished();
    journal_.complete = true;
    return WriteJournal(options_.out, journal_);
  }

  static Status WriteManifest(const std::string& dir, Manifest* manifest) {
    const std::string bytes = SerializeManifest(*manifest);
    manifest->hash = Xxh3Hex(bytes);
    return WriteFileAtomically(Str(dir, "/", kManifestName), bytes);
  }

  static SplitReport ReportSplit(const std::string& dir, const Manifest& manifest) {
    SplitReport split;
    split.dir = dir;
    split.manifest_hash = manifest.hash;
    split.documents = manifest.documents;
    split.tokens = manifest.tokens;
    split.text_bytes = manifest.text_bytes;
    split.shards = static_cast<int64_t>(manifest.shards.size());
    return split;
  }

  void FinishReport(double seconds) {
    report_.tokenizer_sha256 = tokenizer_->sha256();
    report_.vocab_size = tokenizer_->vocab_size();
    const auto bytes = static_cast<double>(report_.train.text_bytes + report_.eval.text_bytes);
    const auto tokens = static_cast<double>(report_.train.tokens + report_.eval.tokens);
    report_.bytes_per_token = tokens > 0 ? bytes / tokens : 0;
    report_.seconds = seconds;
    report_.megabytes_per_second = seconds > 0 ? bytes / 1e6 / seconds : 0;
  }

  StatusOr<PrepareReport> ReportComplete() {
    ASSIGN_OR_RETURN(tokenizer_,
                     tokenizer::Tokenizer::Load(Str(options_.out, "/", kTokenizerName)));
    OpenOptions open;
    open.tokenizer_sha256 = tokenizer_->sha256();
    ASSIGN_OR_RETURN(const std::unique_ptr<Dataset> train, Dataset::Open(options_.out, open));
    report_.train = ReportSplit(options_.out, train->manifest());
    if (has_eval()) {
      ASSIGN_OR_RETURN(const std::unique_ptr<Dataset> eval, Dataset::Open(EvalFolder(), open));
      report_.eval = ReportSplit(EvalFolder(), eval->manifest());
    }
    report_.already_complete = true;
    report_.skipped = listing_.skipped;
    FinishReport(0);
    return report_;
  }

  const PrepareOptions& options_;
  SystemClock clock_;
  uint32_t bpe_size_ = 0;
  text::SourceListing listing_;
  Journal journal_;
  std::unique_ptr<tokenizer::Tokenizer> tokenizer_;
  std::optional<ShardWriter> train_;
  std::optional<ShardWriter> eval_;
  Xxh3Stream source_digest_;
  int64_t next_document_ = 0;
  int64_t documents_stored_ = 0;
  int64_t tokens_stored_ = 0;
  PrepareReport report_;
};

}  // namespace

StatusOr<PrepareReport> Prepare(const PrepareOptions& options) {
  return Preparation(options).Run();
}

}  // namespace heddle::pack
