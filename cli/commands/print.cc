#include "cli/commands/print.h"

#include <cstdio>
#include <iostream>

#include "base/settings/json.h"
#include "cli/commands/verb.h"
#include "cli/output/table.h"

namespace heddle::cli {

void PrintJson(const google::protobuf::Message& message, const std::set<std::string>& omit) {
  std::cout << settings::ToJson(message, {.print_unset = true, .omit = omit}) << '\n' << std::flush;
}

void PrintText(const std::string& text) { std::cout << text << std::flush; }

namespace {

std::string Moved(const char* what, uint64_t bytes, double seconds) {
  const double gigabytes = static_cast<double>(bytes) * 1e-9;
  char text[80];
  std::snprintf(text, sizeof(text), "%s %.1f MB (%.2f GB/s)", what, 1e3 * gigabytes,
                seconds > 0 ? gigabytes / seconds : 0.0);
  return text;
}

// What the experts beyond memory cost in the step: moved, and waited for.
std::string OffloadText(const v1::OffloadUse& use) {
  char waited[64];
  std::snprintf(waited, sizeof(waited), "waited %.0f ms, %llu of %llu uses",
                1e3 * use.exposed_seconds(), static_cast<unsigned long long>(use.misses()),
                static_cast<unsigned long long>(use.hits() + use.misses()));
  return Str(" | Experts: ", Moved("read", use.bytes_read(), use.read_seconds()), ", ",
             Moved("wrote", use.bytes_written(), use.write_seconds()), ", ", waited);
}

}  // namespace

std::string StepLine(const v1::MetricPoint& point) {
  char text[160];
  std::snprintf(text, sizeof(text), "Step %llu | Loss: %.4f | LR: %.2e | Tokens/sec: %.0f",
                static_cast<unsigned long long>(point.step()), point.loss(), point.learning_rate(),
                point.tokens_per_second());
  return Str(text, point.has_offload() ? OffloadText(point.offload()) : "", "\n");
}

std::string LogText(const v1::LogLine& line, bool json, bool prefix) {
  if (json) {
    return Str("{\"attempt\":", line.attempt(), ",\"rank\":", line.rank(),
               ",\"offset\":", line.offset(), ",\"text\":", settings::JsonQuote(line.data()),
               line.lost() > 0 ? Str(",\"lost\":", line.lost()) : "", "}\n");
  }
  std::string text = Printable(line.data(), /*lines=*/true);
  if (text.empty() || text.back() != '\n') {
    text += '\n';
  }
  return prefix ? Str("[", line.attempt(), ".", line.rank(), "] ", text) : text;
}

std::string EventLine(const v1::Event& event) {
  return Str(FormatTime(event.at()), "  ", event.code(), "  ", event.target(), "  ",
             Printable(event.text()), "\n");
}

std::string StateText(const v1::Job& job) {
  if (job.state() == "DONE") {
    return Str("DONE ", job.result());
  }
  return job.phase().empty() ? job.state() : Str(job.state(), " ", job.phase());
}

int JobExitStatus(const v1::Job& job) { return job.result() == "SUCCEEDED" ? 0 : 1; }

}  // namespace heddle::cli
