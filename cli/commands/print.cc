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

std::string StepLine(const v1::MetricPoint& point) {
  char text[160];
  std::snprintf(text, sizeof(text), "Step %llu | Loss: %.4f | LR: %.2e | Tokens/sec: %.0f\n",
                static_cast<unsigned long long>(point.step()), point.loss(), point.learning_rate(),
                point.tokens_per_second());
  return text;
}

std::string LogText(const v1::LogLine& line, bool json, bool prefix) {
  if (json) {
    return Str("{\"attempt\":", line.attempt(), ",\"rank\":", line.rank(),
               ",\"offset\":", line.offset(), ",\"text\":", settings::JsonQuote(line.data()),
               "}\n");
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
