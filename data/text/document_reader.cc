#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <utility>

#include "data/text/document_source.h"
#include "data/text/utf8.h"

namespace heddle::text {
namespace {

constexpr size_t kBinaryProbeBytes = 8192;
constexpr size_t kReadBytes = 1 << 20;

class FileDescriptor {
 public:
  FileDescriptor() = default;
  ~FileDescriptor() { Close(); }
  FileDescriptor(const FileDescriptor&) = delete;
  FileDescriptor& operator=(const FileDescriptor&) = delete;

  Status Open(const std::string& path) {
    Close();
    fd_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOCTTY);
    if (fd_ < 0) return FromErrno("cannot open", path, errno);
    return OkStatus();
  }
  void Close() {
    if (fd_ >= 0) ::close(fd_);
    fd_ = -1;
  }
  bool is_open() const { return fd_ >= 0; }

  // Appends up to `bytes` to `out`; fewer only at the end of the file.
  StatusOr<size_t> Append(const std::string& path, size_t bytes, std::string* out) {
    const size_t before = out->size();
    out->resize(before + bytes);
    size_t done = 0;
    while (done < bytes) {
      const ssize_t got = ::read(fd_, out->data() + before + done, bytes - done);
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) {
        const int error = errno;
        out->resize(before);
        return FromErrno("cannot read", path, error);
      }
      if (got == 0) break;
      done += static_cast<size_t>(got);
    }
    out->resize(before + done);
    return done;
  }

 private:
  int fd_ = -1;
};

// Where to cut `text` so that a document of at most `bytes` bytes ends a line, or at least a
// character.
size_t CutPoint(std::string_view text, size_t bytes) {
  const size_t newline = text.substr(0, bytes).rfind('\n');
  if (newline != std::string_view::npos) return newline + 1;
  size_t cut = bytes;
  while (cut > 0 && (static_cast<unsigned char>(text[cut]) & 0xC0) == 0x80) --cut;
  return cut > 0 ? cut : bytes;
}

}  // namespace

class DocumentReader::Impl {
 public:
  Impl(const SourceListing& listing, const SourceOptions& options)
      : listing_(listing), options_(options) {}

  StatusOr<std::optional<Document>> Next() {
    while (next_file_ < listing_.files.size() || file_.is_open()) {
      if (!file_.is_open()) {
        const SourceFile& opened = listing_.files[next_file_++];
        current_ = &opened;
        buffer_.clear();
        consumed_ = 0;
        end_of_file_ = false;
        offset_ = 0;
        line_ = 0;
        const Status status = file_.Open(opened.path);
        if (!status.ok() && !opened.from_tree) return status;
        if (!status.ok()) ++skipped_["not readable"];
        if (!status.ok()) continue;
      }
      StatusOr<std::optional<Document>> document =
          current_->kind == FileKind::kText ? NextPiece() : NextLine();
      if (!document.ok() || document->has_value()) return document;
    }
    return std::optional<Document>();
  }

  int64_t bytes_read() const { return bytes_read_; }
  const std::map<std::string, int64_t>& skipped() const { return skipped_; }

 private:
  // The next document of a text file: all of it, or the next piece of a very long one. None: file
  // done.
  StatusOr<std::optional<Document>> NextPiece() {
    const size_t cap = static_cast<size_t>(std::max<int64_t>(options_.document_bytes_max, 16));
    if (!end_of_file_) {
      // One byte more than a document may have shows whether the file goes on.
      const size_t hint = static_cast<size_t>(std::max<int64_t>(current_->bytes, 0)) + 1;
      while (buffer_.size() <= cap && !end_of_file_) {
        const size_t room = cap + 1 - buffer_.size();
        const size_t wanted = std::min(room, std::max(hint, kBinaryProbeBytes));
        ASSIGN_OR_RETURN(const size_t got, file_.Append(current_->path, wanted, &buffer_));
        bytes_read_ += static_cast<int64_t>(got);
        end_of_file_ = got < wanted;
      }
    }
    if (buffer_.empty()) {
      file_.Close();
      return std::optional<Document>();
    }
    if (current_->from_tree && offset_ == 0 &&
        std::memchr(buffer_.data(), 0, std::min(buffer_.size(), kBinaryProbeBytes)) != nullptr) {
      return SkipFile("binary");
    }
    const size_t size = buffer_.size() > cap ? CutPoint(buffer_, cap) : buffer_.size();
    const size_t bad = FindInvalidUtf8(std::string_view(buffer_).substr(0, size));
    if (bad != std::string_view::npos) {
      if (current_->from_tree) return SkipFile("not UTF-8");
      return InvalidArgument(
          Str(current_->path, ": byte ", offset_ + static_cast<int64_t>(bad), ": not UTF-8 text"));
    }
    Document document;
    document.name = current_->path;
    if (size == buffer_.size()) {
      document.text = std::move(buffer_);
      buffer_.clear();
    } else {
      document.text = buffer_.substr(0, size);
      buffer_.erase(0, size);
    }
    offset_ += static_cast<int64_t>(size);
    return std::optional<Document>(std::move(document));
  }

  StatusOr<std::optional<Document>> SkipFile(const char* reason) {
    ++skipped_[reason];
    file_.Close();
    buffer_.clear();
    return std::optional<Document>();
  }

  // The next non-empty document of a JSON lines file. None: file done.
  StatusOr<std::optional<Document>> NextLine() {
    while (true) {
      const size_t newline = buffer_.find('\n', consumed_);
      if (newline == std::string::npos && !end_of_file_) {
        RETURN_IF_ERROR(FillLine());
        continue;
      }
      if (newline == std::string::npos && consumed_ == buffer_.size()) {
        file_.Close();
        buffer_.clear();
        return std::optional<Document>();
      }
      const size_t end = newline == std::string::npos ? buffer_.size() : newline;
      const std::string_view line = std::string_view(buffer_).substr(consumed_, end - consumed_);
      consumed_ = newline == std::string::npos ? end : end + 1;
      ++line_;
      if (line.find_first_not_of(" \t\r") == std::string_view::npos) continue;
      ASSIGN_OR_RETURN(Document document, ParseLine(line));
      if (!document.text.empty()) return std::optional<Document>(std::move(document));
    }
  }

  Status FillLine() {
    buffer_.erase(0, consumed_);
    consumed_ = 0;
    // A document escaped as \uXXXX takes up to six bytes a byte.
    if (static_cast<int64_t>(buffer_.size()) > 6 * options_.document_bytes_max) {
      return InvalidArgument(Str(current_->path, ":", line_ + 1, ": line longer than ",
                                 6 * options_.document_bytes_max, " bytes"));
    }
    ASSIGN_OR_RETURN(const size_t got, file_.Append(current_->path, kReadBytes, &buffer_));
    bytes_read_ += static_cast<int64_t>(got);
    end_of_file_ = got < kReadBytes;
    return OkStatus();
  }

  StatusOr<Document> ParseLine(std::string_view line) {
    const std::string where = Str(current_->path, ":", line_);
    const nlohmann::json value = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
    if (value.is_discarded()) return InvalidArgument(Str(where, ": not valid JSON"));
    if (!value.is_object()) return InvalidArgument(Str(where, ": not a JSON object"));
    const auto member = value.find(options_.jsonl_key);
    if (member == value.end() || !member->is_string()) {
      return InvalidArgument(Str(where, ": no string member \"", options_.jsonl_key, "\""));
    }
    Document document;
    document.name = where;
    document.text = member->get<std::string>();
    return document;
  }

  const SourceListing& listing_;
  const SourceOptions& options_;
  size_t next_file_ = 0;
  const SourceFile* current_ = nullptr;
  FileDescriptor file_;
  std::string buffer_;
  size_t consumed_ = 0;  // of buffer_, JSON lines only
  bool end_of_file_ = false;
  int64_t offset_ = 0;  // of buffer_'s beginning in the file, text only
  int64_t line_ = 0;
  int64_t bytes_read_ = 0;
  std::map<std::string, int64_t> skipped_;
};

DocumentReader::DocumentReader(const SourceListing& listing, const SourceOptions& options)
    : impl_(std::make_unique<Impl>(listing, options)) {}
DocumentReader::~DocumentReader() = default;

StatusOr<std::optional<Document>> DocumentReader::Next() { return impl_->Next(); }
int64_t DocumentReader::bytes_read() const { return impl_->bytes_read(); }
const std::map<std::string, int64_t>& DocumentReader::skipped() const { return impl_->skipped(); }

}  // namespace heddle::text
