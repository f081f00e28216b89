#include "cli/output/table.h"

#include <cmath>
#include <cstdio>
#include <ctime>

namespace heddle::cli {
namespace {

// Display width: UTF-8 continuation bytes take no column.
size_t Width(const std::string& text) {
  size_t width = 0;
  for (const char c : text) {
    width += (static_cast<unsigned char>(c) & 0xC0) != 0x80;
  }
  return width;
}

bool Numeric(const std::vector<std::vector<std::string>>& rows, size_t column) {
  bool any = false;
  for (const std::vector<std::string>& row : rows) {
    const std::string& cell = row[column];
    if (cell == "-" || cell.empty()) {
      continue;
    }
    const char first = cell[0];
    if ((first < '0' || first > '9') && first != '-' && first != '.') {
      return false;
    }
    any = true;
  }
  return any;
}

}  // namespace

std::string FormatTable(const std::vector<std::string>& header,
                        const std::vector<std::vector<std::string>>& rows) {
  std::vector<size_t> width;
  std::vector<bool> right;
  for (size_t column = 0; column < header.size(); ++column) {
    size_t widest = Width(header[column]);
    for (const std::vector<std::string>& row : rows) {
      widest = std::max(widest, Width(row[column]));
    }
    width.push_back(widest);
    right.push_back(Numeric(rows, column));
  }
  std::string out;
  const auto add = [&](const std::vector<std::string>& cells) {
    std::string line;
    for (size_t column = 0; column < cells.size(); ++column) {
      const std::string pad(width[column] - Width(cells[column]), ' ');
      line += column == 0 ? "" : "  ";
      line += right[column] ? pad + cells[column] : cells[column] + pad;
    }
    line.erase(line.find_last_not_of(' ') + 1);
    out += line + "\n";
  };
  add(header);
  for (const std::vector<std::string>& row : rows) {
    add(row);
  }
  return out;
}

std::string FormatAge(int64_t milliseconds) {
  if (milliseconds <= 0) {
    return "-";
  }
  const int64_t seconds = milliseconds / 1000;
  char text[32];
  if (seconds < 60) {
    std::snprintf(text, sizeof(text), "%llds", static_cast<long long>(seconds));
  } else if (seconds < 3600) {
    std::snprintf(text, sizeof(text), "%lldm%02llds", static_cast<long long>(seconds / 60),
                  static_cast<long long>(seconds % 60));
  } else if (seconds < 86400) {
    std::snprintf(text, sizeof(text), "%lldh%02lldm", static_cast<long long>(seconds / 3600),
                  static_cast<long long>(seconds % 3600 / 60));
  } else {
    std::snprintf(text, sizeof(text), "%lldd%02lldh", static_cast<long long>(seconds / 86400),
                  static_cast<long long>(seconds % 86400 / 3600));
  }
  return text;
}

std::string FormatTime(int64_t ms_since_1970) {
  if (ms_since_1970 <= 0) {
    return "-";
  }
  const std::time_t seconds = static_cast<std::time_t>(ms_since_1970 / 1000);
  std::tm parts = {};
  gmtime_r(&seconds, &parts);
  char text[40];
  std::strftime(text, sizeof(text), "%Y-%m-%dT%H:%M:%SZ", &parts);
  return text;
}

std::string FormatFixed(double value, int digits) {
  if (!std::isfinite(value)) {
    return "-";
  }
  char text[64];
  std::snprintf(text, sizeof(text), "%.*f", digits, value);
  return text;
}

std::string Printable(const std::string& text, bool lines) {
  std::string out;
  for (const char c : text) {
    const unsigned char byte = static_cast<unsigned char>(c);
    const bool keep = byte >= 0x20 && byte != 0x7F;
    if (keep || (lines && (c == '\n' || c == '\t'))) {
      out += c;
    } else {
      out += '?';
    }
  }
  return out;
}

}  // namespace heddle::cli
