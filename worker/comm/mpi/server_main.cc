// heddle-mpi-server: what a launcher is to OpenMPI, for the ranks of one task. Tells them rank,
// world and peers through PMIx and hands their addresses to the task's first rank, which trades
// them with the other tasks.
//
// usage: heddle-mpi-server NAMESPACE NODE FOLDER RANKS   (the socket of the first rank is fd 3)
//        heddle-mpi-server --check    (exit status 0: OpenMPI is there)
//   NODE: index of this task; RANKS: ranks of every task, "0,1;2,3"; FOLDER: for PMIx's own files
// Ends when the socket is closed.
//
// Source: PMIx 4 standard, chapters on server initialisation and fences. Only what OpenMPI's
// start asks for is served: registration of the job, modex by fence.
#include <dlfcn.h>
#include <pmix.h>
#include <pmix_server.h>
#include <unistd.h>

#include <charconv>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <future>
#include <map>
#include <mutex>
#include <sstream>
#include <string>
#include <system_error>
#include <vector>

#include "worker/comm/mpi/server_pipe.h"

namespace heddle::comm {

namespace {

constexpr int kSocket = 3;

struct Job {
  std::string space;
  size_t node = 0;
  std::string folder;
  std::vector<std::vector<pmix_rank_t>> ranks;  // by node
  uint32_t world = 0;
};

// ---- fences: PMIx calls from a thread of its own and is answered from main() --------------------

struct Fence {
  pmix_modex_cbfunc_t done = nullptr;
  void* token = nullptr;
};

struct Fences {
  std::mutex mutex;
  std::map<uint32_t, Fence> open;
  uint32_t next = 0;
};

Fences& TheFences() {
  static Fences fences;
  return fences;
}

pmix_status_t OnFence(const pmix_proc_t* /*procs*/, size_t /*nprocs*/, const pmix_info_t* /*info*/,
                      size_t /*ninfo*/, char* data, size_t bytes, pmix_modex_cbfunc_t done,
                      void* token) {
  Fences& fences = TheFences();
  const std::lock_guard<std::mutex> lock(fences.mutex);
  const uint32_t number = fences.next++;
  fences.open[number] = {done, token};
  const std::string part(data == nullptr ? "" : data, data == nullptr ? 0 : bytes);
  // A socket that is gone ends the process in main().
  WriteServerMessage(kSocket, ServerMessage::kFence, number, part);
  return PMIX_SUCCESS;
}

void Free(void* memory) { std::free(memory); }

void Answer(uint32_t number, pmix_status_t status, const std::string& parts) {
  Fence fence;
  {
    Fences& fences = TheFences();
    const std::lock_guard<std::mutex> lock(fences.mutex);
    const auto found = fences.open.find(number);
    if (found == fences.open.end()) return;
    fence = found->second;
    fences.open.erase(found);
  }
  char* copy = static_cast<char*>(std::malloc(parts.size() + 1));
  std::memcpy(copy, parts.data(), parts.size());
  fence.done(status, copy, parts.size(), fence.token, Free, copy);
}

// ---- what PMIx tells that needs no answer of ours
// ------------------------------------------------

pmix_status_t OnClient(const pmix_proc_t* /*proc*/, void* /*object*/, pmix_op_cbfunc_t /*done*/,
                       void* /*token*/) {
  return PMIX_OPERATION_SUCCEEDED;
}
pmix_status_t OnAbort(const pmix_proc_t* /*proc*/, void* /*object*/, int /*status*/,
                      const char* /*text*/, pmix_proc_t* /*procs*/, size_t /*nprocs*/,
                      pmix_op_cbfunc_t /*done*/, void* /*token*/) {
  return PMIX_OPERATION_SUCCEEDED;
}
// Every part is exchanged by fence, so what is asked for singly does not exist.
pmix_status_t OnSingleModex(const pmix_proc_t* /*proc*/, const pmix_info_t* /*info*/,
                            size_t /*ninfo*/, pmix_modex_cbfunc_t /*done*/, void* /*token*/) {
  return PMIX_ERR_NOT_FOUND;
}

// ---- registration
// --------------------------------------------------------------------------------

struct Waiting {
  std::promise<pmix_status_t> done;
};
void OnDone(pmix_status_t status, void* waiting) {
  static_cast<Waiting*>(waiting)->done.set_value(status);
}
pmix_status_t Finish(pmix_status_t started, Waiting* waiting) {
  if (started == PMIX_OPERATION_SUCCEEDED) return PMIX_SUCCESS;
  return started == PMIX_SUCCESS ? waiting->done.get_future().get() : started;
}

class InfoList {
 public:
  void Add(const char* key, const void* value, pmix_data_type_t type) {
    pmix_info_t info;
    PMIX_INFO_CONSTRUCT(&info);
    PMIX_INFO_LOAD(&info, key, value, type);
    all_.push_back(info);
  }
  void Add(const char* key, uint32_t value) { Add(key, &value, PMIX_UINT32); }
  void Add(const char* key, const std::string& value) { Add(key, value.c_str(), PMIX_STRING); }
  // Takes `items`.
  void AddArray(const char* key, InfoList* items) {
    pmix_data_array_t* array = nullptr;
    PMIX_DATA_ARRAY_CREATE(array, items->all_.size(), PMIX_INFO);
    std::memcpy(array->array, items->all_.data(), items->all_.size() * sizeof(pmix_info_t));
    pmix_info_t info;
    PMIX_INFO_CONSTRUCT(&info);
    PMIX_LOAD_KEY(info.key, key);
    info.value.type = PMIX_DATA_ARRAY;
    info.value.data.darray = array;
    all_.push_back(info);
  }
  pmix_info_t* data() { return all_.data(); }
  size_t size() const { return all_.size(); }

 private:
  std::vector<pmix_info_t> all_;  // live as long as the process
};

std::string Joined(const std::vector<pmix_rank_t>& ranks) {
  std::string text;
  for (const pmix_rank_t rank : ranks) text += (text.empty() ? "" : ",") + std::to_string(rank);
  return text;
}

// Tasks count as nodes: two of them on one host may be containers that share nothing.
std::string NodeName(size_t node) { return "task-" + std::to_string(node); }

void AddMaps(const Job& job, InfoList* list) {
  std::string nodes;
  std::string ranks;
  for (size_t n = 0; n < job.ranks.size(); ++n) {
    nodes += (n == 0 ? "" : ",") + NodeName(n);
    ranks += (n == 0 ? "" : ";") + Joined(job.ranks[n]);
  }
  char* node_map = nullptr;
  char* rank_map = nullptr;
  PMIx_generate_regex(nodes.c_str(), &node_map);
  PMIx_generate_ppn(ranks.c_str(), &rank_map);
  list->Add(PMIX_NODE_MAP, node_map, PMIX_REGEX);
  list->Add(PMIX_PROC_MAP, rank_map, PMIX_REGEX);
}

void AddRank(size_t node, size_t place, pmix_rank_t rank, InfoList* list) {
  const uint16_t local = static_cast<uint16_t>(place);
  InfoList items;
  items.Add(PMIX_RANK, &rank, PMIX_PROC_RANK);
  items.Add(PMIX_GLOBAL_RANK, &rank, PMIX_PROC_RANK);
  items.Add(PMIX_LOCAL_RANK, &local, PMIX_UINT16);
  items.Add(PMIX_NODE_RANK, &local, PMIX_UINT16);
  items.Add(PMIX_NODEID, static_cast<uint32_t>(node));
  items.Add(PMIX_APPNUM, uint32_t{0});
  items.Add(PMIX_HOSTNAME, NodeName(node));
  list->AddArray(PMIX_PROC_DATA, &items);
}

pmix_status_t RegisterJob(const Job& job) {
  const std::vector<pmix_rank_t>& mine = job.ranks[job.node];
  const uint32_t local = static_cast<uint32_t>(mine.size());
  InfoList list;
  for (const char* key : {PMIX_UNIV_SIZE, PMIX_JOB_SIZE, PMIX_MAX_PROCS}) list.Add(key, job.world);
  list.Add(PMIX_LOCAL_SIZE, local);
  list.Add(PMIX_NODE_SIZE, local);
  list.Add(PMIX_NUM_NODES, static_cast<uint32_t>(job.ranks.size()));
  list.Add(PMIX_JOB_NUM_APPS, uint32_t{1});
  list.Add(PMIX_LOCALLDR, mine.data(), PMIX_PROC_RANK);
  list.Add(PMIX_LOCAL_PEERS, Joined(mine));
  list.Add(PMIX_JOBID, job.space);
  list.Add(PMIX_NSDIR, job.folder);
  list.Add(PMIX_TMPDIR, job.folder);
  AddMaps(job, &list);
  for (size_t n = 0; n < job.ranks.size(); ++n) {
    for (size_t place = 0; place < job.ranks[n].size(); ++place) {
      AddRank(n, place, job.ranks[n][place], &list);
    }
  }
  Waiting waiting;
  return Finish(PMIx_server_register_nspace(job.space.c_str(), static_cast<int>(local), list.data(),
                                            list.size(), OnDone, &waiting),
                &waiting);
}

// Sends the rank's variables to the first rank.
pmix_status_t AdmitRank(const Job& job, pmix_rank_t rank) {
  pmix_proc_t proc;
  PMIX_LOAD_PROCID(&proc, job.space.c_str(), rank);
  Waiting waiting;
  pmix_status_t status = Finish(
      PMIx_server_register_client(&proc, getuid(), getgid(), nullptr, OnDone, &waiting), &waiting);
  char** variables = nullptr;
  if (status == PMIX_SUCCESS) status = PMIx_server_setup_fork(&proc, &variables);
  if (status != PMIX_SUCCESS) return status;
  std::string text;
  for (char** one = variables; one != nullptr && *one != nullptr; ++one) {
    text += *one;
    text += '\0';
  }
  WriteServerMessage(kSocket, ServerMessage::kEnvironment, rank, text);
  return PMIX_SUCCESS;
}

pmix_status_t Serve(const Job& job) {
  static pmix_server_module_t module;
  std::memset(&module, 0, sizeof(module));
  module.client_connected = OnClient;
  module.client_finalized = OnClient;
  module.abort = OnAbort;
  module.fence_nb = OnFence;
  module.direct_modex = OnSingleModex;
  InfoList list;
  list.Add(PMIX_SERVER_TMPDIR, job.folder);
  list.Add(PMIX_SYSTEM_TMPDIR, job.folder);
  pmix_status_t status = PMIx_server_init(&module, list.data(), list.size());
  if (status == PMIX_SUCCESS) status = RegisterJob(job);
  for (const pmix_rank_t rank : job.ranks[job.node]) {
    if (status == PMIX_SUCCESS) status = AdmitRank(job, rank);
  }
  return status;
}

// The number that is the whole text.
bool ParseNumber(const std::string& text, uint32_t* number) {
  const char* end = text.data() + text.size();
  const std::from_chars_result parsed = std::from_chars(text.data(), end, *number);
  return parsed.ec == std::errc() && parsed.ptr == end;
}

bool ParseJob(int argc, char** argv, Job* job) {
  uint32_t node = 0;
  if (argc != 5 || !ParseNumber(argv[2], &node)) return false;
  job->space = argv[1];
  job->node = node;
  job->folder = argv[3];
  std::istringstream nodes(argv[4]);
  for (std::string node; std::getline(nodes, node, ';');) {
    std::vector<pmix_rank_t>& ranks = job->ranks.emplace_back();
    std::istringstream list(node);
    for (std::string rank; std::getline(list, rank, ',');) {
      pmix_rank_t& number = ranks.emplace_back();
      if (!ParseNumber(rank, &number)) return false;
      ++job->world;
    }
  }
  return job->node < job->ranks.size() && !job->ranks[job->node].empty();
}

// PMIx is there, else this process would not have started; OpenMPI is what the plug-in links.
int Check() {
  std::error_code ignored;
  const std::filesystem::path self = std::filesystem::read_symlink("/proc/self/exe", ignored);
  const std::string plugin = (self.parent_path() / "libheddle_mpi.so").string();
  if (dlopen(plugin.c_str(), RTLD_NOW | RTLD_LOCAL) != nullptr) return 0;
  std::fprintf(stderr, "heddle-mpi-server: %s\n", dlerror());
  return 1;
}

int Main(int argc, char** argv) {
  if (argc == 2 && std::strcmp(argv[1], "--check") == 0) return Check();
  Job job;
  if (!ParseJob(argc, argv, &job)) {
    std::fprintf(stderr, "usage: heddle-mpi-server NAMESPACE NODE FOLDER RANKS (socket: fd 3)\n");
    return 2;
  }
  if (const pmix_status_t status = Serve(job); status != PMIX_SUCCESS) {
    WriteServerMessage(kSocket, ServerMessage::kFailed, 0, PMIx_Error_string(status));
  }
  ServerMessage kind;
  uint32_t number = 0;
  std::string bytes;
  while (ReadServerMessage(kSocket, &kind, &number, &bytes)) {
    const bool done = kind == ServerMessage::kFenceDone;
    Answer(number, done ? PMIX_SUCCESS : PMIX_ERR_TIMEOUT, done ? bytes : "");
  }
  // PMIx's own end would wait for its clients, which go on without it.
  std::error_code ignored;
  std::filesystem::remove_all(job.folder, ignored);
  _exit(0);
}

}  // namespace

}  // namespace heddle::comm

int main(int argc, char** argv) { return heddle::comm::Main(argc, argv); }
