// What happens after a change is durable (control-plane P10): messages to workers, file work,
// wake-ups. Each effect may run twice or get lost; the state machine asks again.
#include <filesystem>
#include <fstream>

#include "base/log/log.h"
#include "checkpoint/format/verify.h"
#include "coordinator/runtime/coordinator.h"

namespace heddle::runtime {
namespace {

template <typename... Handlers>
struct Overloaded : Handlers... {
  using Handlers::operator()...;
};
template <typename... Handlers>  // for compilers that do not deduce aggregates
Overloaded(Handlers...)->Overloaded<Handlers...>;

// A copy for `heddle ckpt import`; resume never reads it, so an error is only logged.
void WriteManifestFile(const std::string& folder, const v1::CheckpointRecord& record) {
  v1::CheckpointManifest manifest;
  manifest.set_format_version(1);
  *manifest.mutable_record() = record;
  const std::string path = Str(folder, "/MANIFEST");
  {
    std::ofstream file(path + ".tmp", std::ios::binary | std::ios::trunc);
    manifest.SerializeToOstream(&file);
    if (!file.flush()) {
      HEDDLE_WARN("manifest copy not written", {"path", path});
      return;
    }
  }
  std::error_code error;
  std::filesystem::rename(path + ".tmp", path, error);
}

}  // namespace

void Coordinator::RunEffect(const state::Effect& effect) {
  using namespace state::effect;  // NOLINT: the handlers below name every effect once
  std::visit(
      Overloaded{
          [this](const SendAssign& e) {
            SendTo(e.worker, [&](v1::CoordMsg* m) { *m->mutable_assign() = e.assign; });
          },
          [this](const SendStart& e) {
            SendTo(e.worker, [&](v1::CoordMsg* m) { *m->mutable_start() = e.start; });
          },
          [this](const SendStop& e) {
            SendTo(e.worker, [&](v1::CoordMsg* m) { *m->mutable_stop() = e.stop; });
          },
          [this](const SendKillFenced& e) {
            SendTo(e.worker, [&](v1::CoordMsg* m) { *m->mutable_kill_fenced() = e.kill; });
          },
          [this](const SendForget& e) {
            SendTo(e.worker, [&](v1::CoordMsg* m) { *m->mutable_forget() = e.forget; });
          },
          [this](const SendAck& e) {
            SendTo(e.worker, [&](v1::CoordMsg* m) { *m->mutable_ack() = e.ack; });
          },
          [this](const CollectStacks& e) {
            SendTo(e.worker, [&](v1::CoordMsg* m) { *m->mutable_collect_stacks() = e.collect; });
          },
          [this](const SendCheckpointReply& e) {
            SendTo(e.worker, [&](v1::CoordMsg* m) { *m->mutable_checkpoint() = e.reply; });
          },
          [this](const SendStale& e) {
            if (const auto stream = streams_.find(e.worker);
                stream != streams_.end() && stream->second.session == e.session) {
              SendTo(e.worker, [&](v1::CoordMsg* m) { m->mutable_stale()->set_reason(e.reason); });
            }
          },
          [this](const state::effect::WakeScheduler&) { Coordinator::WakeScheduler(); },
          [this](const DropRendezvous& e) { rendezvous_.Drop(e.fence); },
          [this](const DeleteCheckpointFiles& e) { DeleteFiles(e.key, e.dir); },
          [this](const WriteManifest& e) {
            PostFileWork([folder = Str(options_.checkpoint_root, "/", e.record.dir()),
                          record = e.record] { WriteManifestFile(folder, record); });
          },
          [this](const VerifyCheckpoint& e) { VerifyFiles(e.record); }},
      effect);
}

void Coordinator::SendTo(const std::string& worker,
                         const std::function<void(v1::CoordMsg*)>& fill) {
  const auto stream = streams_.find(worker);
  if (stream == streams_.end()) {
    return;  // registration brings it again (X2)
  }
  v1::CoordMsg message;
  message.set_cluster_id(state_.meta().cluster_id());
  message.set_term(state_.meta().term());
  message.set_session(stream->second.session);
  fill(&message);
  stream->second.send(message);
}

void Coordinator::DeleteFiles(const state::CheckpointKey& key, const std::string& dir) {
  PostLongFileWork([this, key, path = Str(options_.checkpoint_root, "/", dir)] {
    std::error_code error;
    std::filesystem::remove_all(path, error);
    if (error) {
      HEDDLE_WARN("checkpoint files not removed; asked again later", {"path", path},
                  {"error", error.message()});
      return;
    }
    Post([this, key] {
      Execute(state::event::CheckpointFilesDeleted{key}, [](const state::Outcome&) {});
    });
  });
}

void Coordinator::VerifyFiles(const v1::CheckpointRecord& record) {
  PostLongFileWork([this, record] {
    const checkpoint::VerifyReport report =
        checkpoint::VerifyCheckpoint(record, options_.checkpoint_root);
    state::event::CheckpointVerified event;
    event.key = {JobId{record.job()}, Fence{record.fence()}, record.step()};
    event.ok = report.good();
    if (!report.good()) {
      event.detail = checkpoint::ToText(report.problems.front());
    }
    Post([this, event] { Execute(event, [](const state::Outcome&) {}); });
  });
}

}  // namespace heddle::runtime
