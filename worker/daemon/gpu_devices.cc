#include "worker/daemon/gpu_devices.h"

#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <filesystem>
#include <sstream>

#include "base/log/log.h"
#include "base/status/status.h"
#include "worker/control/task_files.h"

namespace heddle::worker {
namespace {

std::string Trimmed(const std::string& text) {
  const size_t first = text.find_first_not_of(" \t\r");
  if (first == std::string::npos) return "";
  return text.substr(first, text.find_last_not_of(" \t\r") - first + 1);
}

std::vector<std::string> Entries(const std::string& list) {
  std::vector<std::string> entries;
  std::istringstream words(list);
  std::string word;
  while (std::getline(words, word, ',')) entries.push_back(Trimmed(word));
  return entries;
}

// The value of "KEY: value" in the text of an `information` file.
std::string Field(const std::string& text, const std::string& key) {
  std::istringstream lines(text);
  std::string line;
  while (std::getline(lines, line)) {
    if (line.starts_with(key + ":")) return Trimmed(line.substr(key.size() + 1));
  }
  return "";
}

// In PCI order, those alone whose device node this container was given.
std::vector<GpuDevice> OfKernel(const GpuSources& sources) {
  std::vector<std::string> addresses;
  std::error_code error;
  for (std::filesystem::directory_iterator at(sources.proc, error), end; !error && at != end;
       at.increment(error)) {
    addresses.push_back(at->path().filename().string());
  }
  std::sort(addresses.begin(), addresses.end());
  std::vector<GpuDevice> devices;
  for (const std::string& address : addresses) {
    std::string text;
    control::ReadWholeFile(Str(sources.proc, "/", address, "/information"), &text);
    const std::string minor = Field(text, "Device Minor");
    if (!minor.empty() && access(Str(sources.dev, "/nvidia", minor).c_str(), F_OK) != 0) continue;
    const std::string uuid = Field(text, "GPU UUID");
    // A device that was never opened shows question marks.
    const bool known = uuid.starts_with("GPU-") && uuid.find('?') == std::string::npos;
    devices.push_back({address, known ? uuid : Str(devices.size()), Field(text, "Model")});
  }
  return devices;
}

// The device that an entry of a list names, by number or UUID (which may be shortened).
std::optional<GpuDevice> Named(const std::string& entry, const std::vector<GpuDevice>& devices) {
  // Part of a device: /proc does not show these.
  if (entry.starts_with("MIG-")) return GpuDevice{entry, entry, devices.front().model};
  if (entry.starts_with("GPU-")) {
    for (const GpuDevice& device : devices) {
      if (device.name.starts_with(entry)) return device;
    }
    const bool known = devices.front().name.starts_with("GPU-");
    return known ? std::nullopt : std::optional(GpuDevice{entry, entry, devices.front().model});
  }
  size_t number = 0;
  const char* const end = entry.data() + entry.size();
  const std::from_chars_result read = std::from_chars(entry.data(), end, number);
  if (entry.empty() || read.ec != std::errc() || read.ptr != end) return std::nullopt;
  return number < devices.size() ? std::optional(devices[number]) : std::nullopt;
}

// `stops`: an entry that names nothing ends the list, as in CUDA; else it is passed over.
std::vector<GpuDevice> Listed(const std::vector<std::string>& entries,
                              const std::vector<GpuDevice>& devices, bool stops) {
  std::vector<GpuDevice> listed;
  for (const std::string& entry : entries) {
    const std::optional<GpuDevice> device = Named(entry, devices);
    if (!device.has_value() && stops) break;
    const bool again = device.has_value() &&
                       std::any_of(listed.begin(), listed.end(),
                                   [&](const GpuDevice& one) { return one.id == device->id; });
    if (device.has_value() && !again) listed.push_back(*device);
  }
  return listed;
}

// The container runtime counts as the host does, and often shows no more than it granted: then the
// numbers of its list say nothing about what is to be seen here.
std::vector<GpuDevice> OfContainer(const std::string& list, const std::vector<GpuDevice>& devices) {
  // "void" belongs to runtimes that hand out devices by other means (CDI).
  if (list == "all" || list == "void") return devices;
  const std::vector<std::string> entries = Entries(list);
  if (entries.empty() || list == "none") return {};
  const bool parts = std::any_of(entries.begin(), entries.end(),
                                 [](const std::string& one) { return one.starts_with("MIG-"); });
  if (!parts && devices.size() <= entries.size()) return devices;
  return Listed(entries, devices, /*stops=*/false);
}

// What the owner of the machine vouches for.
std::vector<GpuDevice> Believed(const GpuSources& sources, int wanted) {
  std::vector<std::string> names = Entries(sources.cuda_visible.value_or(""));
  for (int i = 0; names.size() < static_cast<size_t>(wanted) && !sources.cuda_visible; ++i) {
    names.push_back(Str(i));
  }
  std::vector<GpuDevice> devices;
  for (const std::string& name : names) devices.push_back({name, name, ""});
  return devices;
}

std::optional<std::string> Variable(const char* name) {
  const char* const value = std::getenv(name);
  return value == nullptr ? std::nullopt : std::optional<std::string>(value);
}

}  // namespace

GpuSources GpuSourcesHere() {
  GpuSources sources;
  sources.nvidia_visible = Variable("NVIDIA_VISIBLE_DEVICES");
  sources.cuda_visible = Variable("CUDA_VISIBLE_DEVICES");
  return sources;
}

std::vector<GpuDevice> FindGpus(const GpuSources& sources, int wanted) {
  if (wanted == 0) return {};
  std::vector<GpuDevice> devices = OfKernel(sources);
  if (devices.empty() && wanted > 0) {
    devices = Believed(sources, wanted);
  } else if (!devices.empty()) {
    if (sources.nvidia_visible) devices = OfContainer(Trimmed(*sources.nvidia_visible), devices);
    if (sources.cuda_visible && !devices.empty()) {
      devices = Listed(Entries(*sources.cuda_visible), devices, /*stops=*/true);
    }
  }
  if (wanted > 0 && devices.size() < static_cast<size_t>(wanted)) {
    HEDDLE_WARN("fewer GPUs than told to offer", {"told", wanted}, {"found", devices.size()});
  }
  if (wanted > 0 && devices.size() > static_cast<size_t>(wanted)) {
    devices.resize(static_cast<size_t>(wanted));
  }
  return devices;
}

}  // namespace heddle::worker
