// Documents for `heddle data prepare`: text files, JSON lines and source trees as one stream of
// valid UTF-8 documents in one fixed order, so that everything built from them is reproducible byte
// for byte.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/status/status.h"

namespace heddle::text {

// One document. `text` is valid UTF-8.
struct Document {
  std::string text;
  std::string name;  // path, or path:line for JSON lines
};

enum class FileKind { kText, kJsonLines };

// One file of the listing. `path` is what is opened and named in errors; `key` is the path relative
// to its input, which does not change when the whole input is moved.
struct SourceFile {
  std::string path;
  std::string key;
  FileKind kind = FileKind::kText;
  int64_t bytes = 0;
  bool from_tree = false;
};

struct SourceOptions {
  std::vector<std::string> inputs;      // files and folders, read in this order
  std::vector<std::string> exclude;     // folders that are never entered, such as the output's
  std::vector<std::string> extensions;  // of files in trees, such as ".py"; empty = every text file
  std::string jsonl_key = "text";       // the member that holds a JSON line's document
  int64_t tree_file_bytes_max = 16 << 20;  // larger files of a tree are skipped and counted
  int64_t document_bytes_max =
      64 << 20;  // a longer text file is cut at line ends into documents of this size
};

// What ListFiles found. `skipped` counts files of trees left out, by reason ("binary", "too large",
// "hidden", "version control", "seen before", "not a regular file", "other extension", "not
// readable").
struct SourceListing {
  std::vector<SourceFile> files;
  int64_t bytes = 0;
  std::map<std::string, int64_t> skipped;
};

// Lists the files of `options.inputs`. Trees are walked in byte order of their names, symbolic
// links are followed, and a file or folder reached twice counts once, so loops end. NOT_FOUND names
// an input that does not exist, INVALID_ARGUMENT an input of no known kind or inputs that hold no
// text at all. Blocking.
StatusOr<SourceListing> ListFiles(const SourceOptions& options);

// Streams the documents of a listing in order, one file open at a time. Not thread-safe; blocking.
class DocumentReader {
 public:
  // `listing` must outlive the reader.
  DocumentReader(const SourceListing& listing, const SourceOptions& options);
  ~DocumentReader();
  DocumentReader(const DocumentReader&) = delete;
  DocumentReader& operator=(const DocumentReader&) = delete;

  // The next document, or nullopt at the end. A tree's file that turns out binary or not UTF-8 is
  // skipped and counted; in a file that was named explicitly that is INVALID_ARGUMENT with file and
  // byte offset (for JSON lines file:line). Empty files are no documents. A read error is
  // UNAVAILABLE with the file's name.
  StatusOr<std::optional<Document>> Next();

  // Bytes of source files consumed so far, for progress.
  int64_t bytes_read() const;
  // Files of trees skipped while reading, by reason, beside those of the listing.
  const std::map<std::string, int64_t>& skipped() const;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace heddle::text
