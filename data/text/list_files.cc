#include <dirent.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "data/text/document_source.h"

namespace heddle::text {
namespace {

constexpr int kDepthMax = 200;

bool EndsWith(std::string_view text, std::string_view end) { return text.ends_with(end); }

bool IsVersionControl(std::string_view name) {
  return name == ".git" || name == ".hg" || name == ".svn" || name == ".bzr" || name == "CVS" ||
         name == "_darcs" || name == ".jj";
}

// What the file's name says that heddle cannot read as text; empty if nothing.
std::string UnreadableForm(std::string_view path) {
  for (const char* end : {".zst", ".gz", ".bz2", ".xz", ".zip", ".parquet", ".arrow"}) {
    if (EndsWith(path, end)) return end;
  }
  return "";
}

FileKind KindOf(std::string_view path) {
  return EndsWith(path, ".jsonl") || EndsWith(path, ".ndjson") ? FileKind::kJsonLines
                                                               : FileKind::kText;
}

class Walk {
 public:
  Walk(const SourceOptions& options, SourceListing* listing)
      : options_(options), listing_(*listing) {
    for (const std::string& folder : options.exclude) {
      struct stat info;
      if (::stat(folder.c_str(), &info) == 0) excluded_.insert({info.st_dev, info.st_ino});
    }
  }

  Status AddInput(const std::string& input) {
    struct stat info;
    if (::stat(input.c_str(), &info) != 0) return FromErrno("cannot read input", input, errno);
    if (S_ISDIR(info.st_mode)) {
      root_ = input;
      while (root_.size() > 1 && root_.back() == '/') root_.pop_back();
      if (!First(info)) return OkStatus();
      return AddFolder(root_, "", 0);
    }
    if (!S_ISREG(info.st_mode)) {
      return InvalidArgument(Str("input ", input, ": neither a file nor a folder"));
    }
    const std::string form = UnreadableForm(input);
    if (!form.empty()) {
      return InvalidArgument(Str("input ", input, ": ", form,
                                 " files are not supported; unpack or convert to .jsonl"));
    }
    if (First(info)) {
      const size_t slash = input.rfind('/');
      Add(input, slash == std::string::npos ? input : input.substr(slash + 1), info, false);
    }
    return OkStatus();
  }

 private:
  // False, and counted, if this file or folder was reached before.
  bool First(const struct stat& info) {
    if (seen_.insert({info.st_dev, info.st_ino}).second) return true;
    ++listing_.skipped["seen before"];
    return false;
  }

  void Add(const std::string& path, const std::string& key, const struct stat& info, bool tree) {
    SourceFile file;
    file.path = path;
    file.key = key;
    file.kind = KindOf(path);
    file.bytes = info.st_size;
    file.from_tree = tree;
    listing_.bytes += file.bytes;
    listing_.files.push_back(std::move(file));
  }

  static StatusOr<std::vector<std::string>> SortedNames(const std::string& folder) {
    DIR* handle = ::opendir(folder.c_str());
    if (handle == nullptr) return FromErrno("cannot list", folder, errno);
    std::vector<std::string> names;
    while (true) {
      errno = 0;
      const dirent* entry = ::readdir(handle);
      if (entry == nullptr) break;
      const std::string_view name = entry->d_name;
      if (name != "." && name != "..") names.emplace_back(name);
    }
    const int error = errno;
    ::closedir(handle);
    if (error != 0) return FromErrno("cannot list", folder, error);
    std::sort(names.begin(), names.end());
    return names;
  }

  Status AddFolder(const std::string& folder, const std::string& prefix, int depth) {
    StatusOr<std::vector<std::string>> names = SortedNames(folder);
    if (!names.ok()) {
      // The input itself must be readable; a closed folder inside it is skipped.
      if (depth == 0) return names.status();
      ++listing_.skipped["not readable"];
      return OkStatus();
    }
    for (const std::string& name : *names) {
      RETURN_IF_ERROR(AddEntry(Str(folder, "/", name), prefix + name, name, depth));
    }
    return OkStatus();
  }

  Status AddEntry(const std::string& path, const std::string& key, const std::string& name,
                  int depth) {
    struct stat info;
    if (::stat(path.c_str(), &info) != 0) {  // a dangling link, a link to itself, a closed folder
      ++listing_.skipped["not readable"];
      return OkStatus();
    }
    if (IsVersionControl(name)) {
      ++listing_.skipped["version control"];
      return OkStatus();
    }
    if (name[0] == '.') {
      ++listing_.skipped["hidden"];
      return OkStatus();
    }
    if (S_ISDIR(info.st_mode)) {
      if (excluded_.count({info.st_dev, info.st_ino}) != 0) {
        ++listing_.skipped["excluded"];
        return OkStatus();
      }
      if (depth + 1 >= kDepthMax) {
        ++listing_.skipped["too deep"];
        return OkStatus();
      }
      return First(info) ? AddFolder(path, key + "/", depth + 1) : OkStatus();
    }
    if (!S_ISREG(info.st_mode)) {
      ++listing_.skipped["not a regular file"];
    } else if (!ExtensionWanted(name)) {
      ++listing_.skipped["other extension"];
    } else if (!UnreadableForm(name).empty()) {
      ++listing_.skipped["binary"];
    } else if (KindOf(name) == FileKind::kText && info.st_size > options_.tree_file_bytes_max) {
      ++listing_.skipped["too large"];
    } else if (First(info)) {
      Add(path, key, info, true);
    }
    return OkStatus();
  }

  bool ExtensionWanted(std::string_view name) const {
    if (options_.extensions.empty()) return true;
    return std::any_of(options_.extensions.begin(), options_.extensions.end(),
                       [name](const std::string& end) { return EndsWith(name, end); });
  }

  const SourceOptions& options_;
  SourceListing& listing_;
  std::string root_;
  std::set<std::pair<dev_t, ino_t>> excluded_;
  std::set<std::pair<dev_t, ino_t>> seen_;
};

}  // namespace

StatusOr<SourceListing> ListFiles(const SourceOptions& options) {
  if (options.inputs.empty()) return InvalidArgument("no input given");
  SourceListing listing;
  Walk walk(options, &listing);
  for (const std::string& input : options.inputs) RETURN_IF_ERROR(walk.AddInput(input));
  if (listing.files.empty()) {
    std::string reasons;
    for (const auto& [reason, count] : listing.skipped) reasons += Str("; ", count, " ", reason);
    return InvalidArgument(Str("input ", options.inputs[0],
                               options.inputs.size() > 1 ? " and others" : "",
                               ": no text files found", reasons));
  }
  return listing;
}

}  // namespace heddle::text
