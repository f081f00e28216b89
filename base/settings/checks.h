// What must hold beyond types: ranges, cross-field rules, and the table of what this version
// accepts as a word but cannot run. Internal to base/settings.
#pragma once

#include <string>
#include <vector>

#include "base/settings/value.h"
#include "heddle/v1/config.pb.h"

namespace heddle::settings {

// Every number of a message tree against its declared range, names against their characters, fields
// this build does not know.
void CheckRanges(const google::protobuf::Message& message, Problems& problems);

// Rules between fields of a run (attention-and-moe.md section 1.1 and product.md section 5).
void CheckFields(const v1::RunConfig& config, Problems& problems);

// One problem per row of the table that applies.
void CheckTable(const v1::RunConfig& config, Problems& problems);

// Legal, but without effect: one sentence each.
std::vector<std::string> Warnings(const v1::RunConfig& config);

// Why setting `canonical` to another value than its default changes nothing in this config; empty:
// it does change something.
std::string WhyIdle(const v1::RunConfig& config, const std::string& canonical);

// What the table says of a key ("only dense, swa in this version: ..."); empty: nothing.
std::string LimitationOf(const std::string& canonical);

}  // namespace heddle::settings
