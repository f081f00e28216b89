// heddle-model bench-host: measures this host, shows and keeps the figures.
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "model/tool/host_bench.h"
#include "model/tool/verbs.h"

namespace heddle::tool {
namespace {

// The file of `heddle plan` (cli/commands/host_figures.h).
nlohmann::ordered_json ToJson(const HostBench& bench) {
  return {{"version", 1},
          {"host", bench.host},
          {"cpu", bench.cpu},
          {"threads", bench.threads},
          {"measured_at", bench.measured_at_ms},
          {"bf16_flops", bench.bf16_flops},
          {"fp32_flops", bench.fp32_flops},
          {"dram_bytes", bench.dram_bytes},
          {"dram_thread_bytes", bench.dram_thread_bytes},
          {"update_ns", bench.update_ns},
          {"update_thread_ns", bench.update_thread_ns},
          {"update_bytes", bench.update_bytes},
          {"exchange_bytes", bench.exchange_bytes},
          {"disk_dir", bench.disk_dir},
          {"disk_direct", bench.disk_direct},
          {"disk_read_bytes", bench.disk_read_bytes},
          {"disk_write_bytes", bench.disk_write_bytes},
          {"seconds", bench.seconds}};
}

// Written beside it and renamed: a plan never reads half a file.
Status Keep(const std::string& text, const std::string& path) {
  std::error_code ignored;  // what stands in the way shows when the file is opened
  std::filesystem::create_directories(std::filesystem::path(path).parent_path(), ignored);
  const std::string temporary = path + ".tmp";
  {
    std::ofstream file(temporary, std::ios::trunc);
    file << text << "\n";
    if (!file.flush()) return FromErrno("cannot write", temporary);
  }
  return std::rename(temporary.c_str(), path.c_str()) == 0 ? OkStatus()
                                                           : FromErrno("cannot write", path);
}

void Row(const char* name, double value, const char* unit) {
  if (value > 0) {
    std::printf("%-34s %10.3f %s\n", name, value, unit);
  } else {
    std::printf("%-34s %10s\n", name, "not measured");
  }
}

void Print(const HostBench& bench) {
  std::printf("%s: %s, %lld threads\n", bench.host.c_str(), bench.cpu.c_str(),
              static_cast<long long>(bench.threads));
  Row("products bf16", bench.bf16_flops / 1e12, "TFLOP/s");
  Row("products fp32", bench.fp32_flops / 1e12, "TFLOP/s");
  Row("memory, all threads", bench.dram_bytes / 1e9, "GB/s");
  Row("memory, one thread", bench.dram_thread_bytes / 1e9, "GB/s");
  Row("AdamW, all threads", bench.update_ns, "ns/parameter");
  Row("AdamW, one thread", bench.update_thread_ns, "ns/parameter");
  Row("shared memory between two ranks", bench.exchange_bytes / 1e9, "GB/s");
  Row("disk read", bench.disk_read_bytes / 1e9, "GB/s");
  Row("disk write, synced", bench.disk_write_bytes / 1e9, "GB/s");
  std::printf("disk: %s%s; measured in %.1f s\n", bench.disk_dir.c_str(),
              bench.disk_direct ? "" : " (its file system has no O_DIRECT: rates of the cache)",
              bench.seconds);
}

}  // namespace

Status RunBenchHost(const BenchHostOptions& options) {
  ASSIGN_OR_RETURN(const HostBench bench, MeasureHost(options.dir));
  const std::string text = ToJson(bench).dump();
  if (!options.out.empty()) RETURN_IF_ERROR(Keep(text, options.out));
  if (options.json) {
    std::printf("%s\n", text.c_str());
    return OkStatus();
  }
  Print(bench);
  if (!options.out.empty()) std::printf("kept in %s for heddle plan\n", options.out.c_str());
  return OkStatus();
}

}  // namespace heddle::tool
