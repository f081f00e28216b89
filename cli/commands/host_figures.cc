#include "cli/commands/host_figures.h"

#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

namespace heddle::cli {
namespace {

// Of model/tool/bench_host.cc.
constexpr int64_t kVersion = 1;
// Hosts with more threads than this are not built.
constexpr int64_t kThreadsMax = 1 << 20;

// A rate that is known, 0 where it is not; false: no rate at all.
bool TakeRate(const nlohmann::json& json, const char* name, double* rate) {
  if (!json.contains(name)) return true;
  if (!json[name].is_number()) return false;
  *rate = json[name].get<double>();
  return std::isfinite(*rate) && *rate >= 0;
}

bool TakeAll(const nlohmann::json& json, KeptFigures* kept) {
  for (const char* name : {"version", "threads", "measured_at"}) {
    if (!json.contains(name) || !json[name].is_number_integer()) return false;
  }
  for (const char* name : {"host", "cpu", "disk_dir"}) {
    if (!json.contains(name) || !json[name].is_string()) return false;
  }
  kept->host = json["host"].get<std::string>();
  kept->cpu = json["cpu"].get<std::string>();
  kept->disk_dir = json["disk_dir"].get<std::string>();
  kept->measured_at = json["measured_at"].get<int64_t>();
  model::HostFigures& rates = kept->rates;
  rates.threads = json["threads"].get<int64_t>();
  return json["version"].get<int64_t>() == kVersion && rates.threads > 0 &&
         rates.threads <= kThreadsMax && !kept->host.empty() &&
         TakeRate(json, "bf16_flops", &rates.bf16_flops) &&
         TakeRate(json, "fp32_flops", &rates.fp32_flops) &&
         TakeRate(json, "dram_bytes", &rates.dram_bytes) &&
         TakeRate(json, "dram_thread_bytes", &rates.dram_thread_bytes) &&
         TakeRate(json, "update_bytes", &rates.update_bytes) &&
         TakeRate(json, "exchange_bytes", &rates.exchange_bytes) &&
         TakeRate(json, "disk_read_bytes", &rates.disk_read_bytes) &&
         TakeRate(json, "disk_write_bytes", &rates.disk_write_bytes);
}

}  // namespace

std::string HostFiguresPath(const std::string& home) { return home + "/host_bench.json"; }

StatusOr<KeptFigures> ReadHostFigures(const std::string& home) {
  const std::string path = HostFiguresPath(home);
  std::ifstream file(path);
  if (!file) return NotFound(Str("no ", path, ": run heddle bench-host"));
  std::stringstream text;
  text << file.rdbuf();
  const nlohmann::json json = nlohmann::json::parse(text.str(), nullptr, false);
  KeptFigures kept;
  if (!json.is_object() || !TakeAll(json, &kept)) {
    return DataLoss(Str(path, ": not the figures of a host: run heddle bench-host again"));
  }
  return kept;
}

}  // namespace heddle::cli
