#include "base/settings/yaml_reader.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#include <yaml-cpp/eventhandler.h>
#include <yaml-cpp/exceptions.h>
#include <yaml-cpp/parser.h>

#include <algorithm>
#include <map>
#include <set>
#include <sstream>

#include "base/settings/utf8.h"

namespace heddle::settings {
namespace {

// yaml-cpp spends microseconds on each, used or not.
constexpr int kReferencesMax = 10000;
constexpr int kQuotesMax = 100000;        // and escapes
constexpr size_t kMessageBytesMax = 200;  // its messages may quote the whole file

// Leaves yaml-cpp's parser; caught in ReadYaml.
struct Refused {
  int line;
  int column;
  std::string text;
};

int Line(const YAML::Mark& mark) { return mark.line + 1; }
int Column(const YAML::Mark& mark) { return mark.column + 1; }

// Builds the tree bottom-up on a stack of open collections.
class Builder : public YAML::EventHandler {
 public:
  bool has_document() const { return documents_ > 0; }
  Value TakeRoot() { return std::move(root_); }

  void OnDocumentStart(const YAML::Mark& mark) override {
    if (++documents_ > 1) {
      throw Refused{Line(mark), Column(mark), "a second document in one file"};
    }
  }
  void OnDocumentEnd() override {}

  void OnNull(const YAML::Mark& mark, YAML::anchor_t anchor) override {
    Value value;
    Place(std::move(value), mark, anchor);
  }
  void OnScalar(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                const std::string& text) override {
    RefuseTag(mark, tag);
    Value value = Value::Scalar(text, tag == "!");
    Place(std::move(value), mark, anchor);
  }
  void OnAlias(const YAML::Mark& mark, YAML::anchor_t anchor) override {
    const auto found = anchors_.find(anchor);
    if (found == anchors_.end()) {
      throw Refused{Line(mark), Column(mark), "an alias inside its own anchor"};
    }
    Count(mark, found->second.nodes - 1);  // Place counts the last one
    Value copy = found->second.value;
    if (open_.size() + static_cast<size_t>(found->second.depth) > kDepthMax) {
      throw Refused{Line(mark), Column(mark), Str("nested deeper than ", kDepthMax)};
    }
    copy.line = Line(mark);
    copy.column = Column(mark);
    Place(std::move(copy), mark, 0);
  }
  void OnSequenceStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                       YAML::EmitterStyle::value) override {
    Open(Value::Kind::kList, mark, tag, anchor);
  }
  void OnSequenceEnd() override { Close(); }
  void OnMapStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                  YAML::EmitterStyle::value) override {
    Open(Value::Kind::kMap, mark, tag, anchor);
  }
  void OnMapEnd() override { Close(); }

 private:
  struct Frame {
    Value value;
    YAML::Mark mark;
    YAML::anchor_t anchor = 0;
    int nodes_before = 0;
    bool has_key = false;  // a map's key waits for its value
    Value::Key key;
    std::set<std::string> keys;
  };
  struct Anchor {
    Value value;
    int nodes = 1;
    int depth = 1;
  };

  static void RefuseTag(const YAML::Mark& mark, const std::string& tag) {
    if (!tag.empty() && tag != "?" && tag != "!") {
      throw Refused{Line(mark), Column(mark),
                    Str("the tag ", tag.substr(0, 60), " is not allowed")};
    }
  }

  void Count(const YAML::Mark& mark, int nodes) {
    nodes_ += nodes;
    if (nodes_ > kNodesMax) {
      throw Refused{Line(mark), Column(mark),
                    Str("more than ", kNodesMax, " values, aliases expanded")};
    }
  }

  void Open(Value::Kind kind, const YAML::Mark& mark, const std::string& tag,
            YAML::anchor_t anchor) {
    RefuseTag(mark, tag);
    if (open_.size() >= kDepthMax) {
      throw Refused{Line(mark), Column(mark), Str("nested deeper than ", kDepthMax)};
    }
    if (!open_.empty() && open_.back().value.kind == Value::Kind::kMap && !open_.back().has_key) {
      throw Refused{Line(mark), Column(mark), "a key must be plain text"};
    }
    Frame frame;
    frame.value.kind = kind;
    frame.mark = mark;
    frame.anchor = anchor;
    frame.nodes_before = nodes_;
    open_.push_back(std::move(frame));
  }

  void Close() {
    Frame frame = std::move(open_.back());
    open_.pop_back();
    Place(std::move(frame.value), frame.mark, frame.anchor, frame.nodes_before);
  }

  static int Depth(const Value& value) {
    int depth = 0;
    for (const Value& item : value.items) {
      depth = std::max(depth, Depth(item));
    }
    for (const auto& member : value.members) {
      depth = std::max(depth, Depth(member.second));
    }
    return depth + (value.kind == Value::Kind::kList || value.kind == Value::Kind::kMap ? 1 : 0);
  }

  // Puts a finished value where it belongs: as the root, an item, a key or a key's value.
  void Place(Value value, const YAML::Mark& mark, YAML::anchor_t anchor, int nodes_before = -1) {
    const int before = nodes_before < 0 ? nodes_ : nodes_before;
    Count(mark, 1);
    if (value.line == 0) {
      value.line = Line(mark);
      value.column = Column(mark);
    }
    if (anchor != 0) {
      const int nodes = nodes_ - before;
      Count(mark, nodes);  // the copy: nested anchors must not multiply unseen
      anchors_[anchor] = Anchor{value, nodes, Depth(value)};
    }
    if (open_.empty()) {
      root_ = std::move(value);
      return;
    }
    Frame& parent = open_.back();
    if (parent.value.kind == Value::Kind::kList) {
      parent.value.items.push_back(std::move(value));
    } else if (!parent.has_key) {
      PlaceKey(parent, value, mark);
    } else {
      parent.has_key = false;
      parent.value.members.push_back({std::move(parent.key), std::move(value)});
    }
  }

  static void PlaceKey(Frame& parent, const Value& key, const YAML::Mark& mark) {
    if (key.kind != Value::Kind::kScalar) {
      throw Refused{Line(mark), Column(mark), "a key must be plain text"};
    }
    if (key.text == "<<" && !key.quoted) {
      throw Refused{Line(mark), Column(mark), "merge keys (<<) are not supported"};
    }
    if (!parent.keys.insert(key.text).second) {
      throw Refused{Line(mark), Column(mark), Str(key.text.substr(0, 100), ": duplicate key")};
    }
    parent.key = {key.text, Line(mark), Column(mark)};
    parent.has_key = true;
  }

  Value root_;
  std::vector<Frame> open_;
  std::map<YAML::anchor_t, Anchor> anchors_;
  int nodes_ = 0;
  int documents_ = 0;
};

Status At(const std::string& source, int line, int column, const std::string& text) {
  return InvalidArgument(Str(source, ":", line, ":", column, ": ", text));
}

void LineAndColumn(const std::string& text, size_t offset, int& line, int& column) {
  line = 1 + static_cast<int>(std::count(text.begin(), text.begin() + offset, '\n'));
  const size_t start = offset == 0 ? std::string::npos : text.rfind('\n', offset - 1);
  column = static_cast<int>(start == std::string::npos ? offset : offset - start - 1) + 1;
}

// What must hold before yaml-cpp sees the text. Brackets are counted wherever they stand, quotes
// included: a quote that only looks like one must not hide a bomb.
Status Prescan(const std::string& text, const std::string& source) {
  if (text.size() > kFileBytesMax) {
    return InvalidArgument(
        Str(source, ": ", text.size(), " bytes; a config has at most ", kFileBytesMax));
  }
  int line = 0;
  int column = 0;
  int depth = 0;
  int separators = 0;
  int references = 0;
  int quotes = 0;
  for (size_t i = 0; i < text.size(); ++i) {
    const unsigned char c = static_cast<unsigned char>(text[i]);
    std::string problem;
    if (c == '[' || c == '{') {
      problem = ++depth > kDepthMax ? Str("brackets nested deeper than ", kDepthMax) : "";
    } else if (c == ']' || c == '}') {
      depth = std::max(depth - 1, 0);
    } else if (c == '&' || c == '*') {
      problem = ++references > kReferencesMax
                    ? Str("more than ", kReferencesMax, " anchors and aliases")
                    : "";
    } else if (c == '"' || c == '\'' || c == '\\' || c == '%') {
      problem = ++quotes > kQuotesMax ? Str("more than ", kQuotesMax, " quotes and escapes") : "";
    } else if (c == ',' || c == '\n' || c == '-' || c == '?' || c == ':') {
      problem = ++separators > 2 * kNodesMax ? Str("more than ", kNodesMax, " values") : "";
    } else if (c == 0x7F || (c < 0x20 && c != '\t' && c != '\r')) {
      problem = "a control character";
    }
    if (!problem.empty()) {
      LineAndColumn(text, i, line, column);
      return At(source, line, column, problem);
    }
  }
  size_t offset = 0;
  if (!IsUtf8(text, &offset)) {
    LineAndColumn(text, offset, line, column);
    return At(source, line, column, "invalid UTF-8");
  }
  return OkStatus();
}

}  // namespace

StatusOr<Value> ReadYaml(const std::string& text, const std::string& source) {
  RETURN_IF_ERROR(Prescan(text, source));
  Builder builder;
  // yaml-cpp reports by exceptions only; they end here (architecture S25).
  try {
    std::istringstream stream(text);
    YAML::Parser parser(stream);
    while (parser.HandleNextDocument(builder)) {
    }
  } catch (const Refused& refused) {
    return At(source, refused.line, refused.column, refused.text);
  } catch (const YAML::Exception& error) {
    return At(source, Line(error.mark), Column(error.mark), error.msg.substr(0, kMessageBytesMax));
  }
  Value root;
  if (builder.has_document()) {
    root = builder.TakeRoot();
  }
  if (root.kind == Value::Kind::kNull) {
    root.kind = Value::Kind::kMap;
    root.line = root.column = 1;
  }
  return root;
}

StatusOr<std::string> ReadConfigFile(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) {
    return FromErrno("cannot read", path);
  }
  struct stat info = {};
  const bool regular = fstat(fd, &info) == 0 && S_ISREG(info.st_mode);
  std::string text;
  Status status;
  if (!regular) {
    status = InvalidArgument(Str(path, ": not a regular file"));
  } else if (info.st_size > static_cast<off_t>(kFileBytesMax)) {
    status = InvalidArgument(
        Str(path, ": ", info.st_size, " bytes; a config has at most ", kFileBytesMax));
  } else {
    text.resize(kFileBytesMax + 1);
    size_t size = 0;
    ssize_t got = 0;
    while (size < text.size() && (got = read(fd, text.data() + size, text.size() - size)) > 0) {
      size += static_cast<size_t>(got);
    }
    text.resize(size);
    status = got < 0 ? FromErrno("cannot read", path) : OkStatus();
  }
  close(fd);
  RETURN_IF_ERROR(status);
  return text;
}

}  // namespace heddle::settings
