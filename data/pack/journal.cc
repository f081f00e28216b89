#include "data/pack/journal.h"

#include <nlohmann/json.hpp>

#include "data/pack/files.h"

namespace heddle::pack {
namespace {

using nlohmann::ordered_json;

ordered_json ToJson(const std::vector<FinishedShard>& shards) {
  ordered_json list = ordered_json::array();
  for (const FinishedShard& shard : shards) {
    list.push_back({{"file", shard.entry.file},
                    {"tokens", shard.entry.tokens},
                    {"documents", shard.entry.documents},
                    {"bytes", shard.entry.bytes},
                    {"xxh3_128", shard.entry.xxh3_128},
                    {"table_crc32c", shard.entry.table_crc32c},
                    {"text_bytes", shard.text_bytes},
                    {"next_source_document", shard.next_source_document}});
  }
  return list;
}

std::vector<FinishedShard> FromJson(const ordered_json& list) {
  std::vector<FinishedShard> shards;
  for (const ordered_json& fields : list) {
    FinishedShard shard;
    shard.entry.file = fields.at("file").get<std::string>();
    shard.entry.tokens = fields.at("tokens").get<int64_t>();
    shard.entry.documents = fields.at("documents").get<int64_t>();
    shard.entry.bytes = fields.at("bytes").get<int64_t>();
    shard.entry.xxh3_128 = fields.at("xxh3_128").get<std::string>();
    shard.entry.table_crc32c = fields.at("table_crc32c").get<uint32_t>();
    shard.text_bytes = fields.at("text_bytes").get<int64_t>();
    shard.next_source_document = fields.at("next_source_document").get<int64_t>();
    shards.push_back(std::move(shard));
  }
  return shards;
}

}  // namespace

StatusOr<std::optional<Journal>> ReadJournal(const std::string& dir) {
  const std::string path = Str(dir, "/", kJournalName);
  const StatusOr<std::string> bytes = ReadFile(path);
  if (!bytes.ok() && bytes.status().code() == StatusCode::kNotFound) {
    return std::optional<Journal>();
  }
  if (!bytes.ok()) return bytes.status();
  try {
    const ordered_json root = ordered_json::parse(*bytes);
    Journal journal;
    journal.fingerprint = root.at("fingerprint").get<std::string>();
    journal.complete = root.at("complete").get<bool>();
    journal.tokenizer_sha256 = root.at("tokenizer_sha256").get<std::string>();
    journal.train = FromJson(root.at("train"));
    journal.eval = FromJson(root.at("eval"));
    return std::optional<Journal>(std::move(journal));
  } catch (const ordered_json::exception& error) {
    return DataLoss(Str(path, ": damaged: ", error.what(), "; remove the folder and start again"));
  }
}

Status WriteJournal(const std::string& dir, const Journal& journal) {
  const ordered_json root = {{"fingerprint", journal.fingerprint},
                             {"complete", journal.complete},
                             {"tokenizer_sha256", journal.tokenizer_sha256},
                             {"train", ToJson(journal.train)},
                             {"eval", ToJson(journal.eval)}};
  return WriteFileAtomically(Str(dir, "/", kJournalName), root.dump(1) + "\n");
}

}  // namespace heddle::pack
