// Printing shared by verbs: one JSON object a call, or a table.
#pragma once

#include <set>
#include <string>

#include "heddle/v1/jobs.pb.h"

namespace google::protobuf {
class Message;
}

namespace heddle::cli {

struct CommandContext;

// One line of JSON (formats F4) and a newline, flushed: streams are read while they run.
// Fields named in `omit` are left out.
void PrintJson(const google::protobuf::Message& message, const std::set<std::string>& omit = {});

void PrintText(const std::string& text);

// "Step 120 | Loss: 3.2101 | LR: 1.0e-03 | Tokens/sec: 5120" (formats section 7).
std::string StepLine(const v1::MetricPoint& point);

// What a rank printed: escaped text that ends with a newline, `prefix` puts [ATTEMPT.RANK] before
// it; or one JSON object with the text as it was.
std::string LogText(const v1::LogLine& line, bool json, bool prefix);

// One line: time, code, target, text.
std::string EventLine(const v1::Event& event);

// State as people read it: "ACTIVE RUNNING", "DONE SUCCEEDED".
std::string StateText(const v1::Job& job);

// Exit status for a job that ended: 0 SUCCEEDED, else 1.
int JobExitStatus(const v1::Job& job);

}  // namespace heddle::cli
