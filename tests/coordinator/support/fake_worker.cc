#include "tests/coordinator/support/fake_worker.h"

#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <chrono>

#include "base/net/grpc_channel.h"
#include "checkpoint/format/shard_writer.h"

namespace heddle::test {
namespace {

constexpr uint64_t kElementsPerRank = 16;

}  // namespace

struct FakeWorker::Stream {
  grpc::ClientContext context;
  std::unique_ptr<grpc::ClientReaderWriter<v1::WorkerMsg, v1::CoordMsg>> calls;
};

FakeWorker::FakeWorker(std::shared_ptr<grpc::Channel> channel, FakeWorkerOptions options)
    : channel_(std::move(channel)),
      options_(std::move(options)),
      stub_(v1::WorkerLink::NewStub(channel_)) {}

FakeWorker::~FakeWorker() { Disconnect(); }

StatusOr<v1::RegisterReply> FakeWorker::Connect(const std::vector<v1::TaskReport>& tasks) {
  Disconnect();
  static uint64_t sessions = 1000;
  session_ = ++sessions;
  v1::RegisterRequest request;
  request.set_worker_id(options_.id);
  request.set_instance(options_.instance);
  request.set_session(session_);
  request.set_highest_term(term_);
  request.set_host(options_.id + ".test");
  request.mutable_capacity()->set_cpus(options_.cpus);
  request.mutable_capacity()->set_memory_bytes(options_.memory_bytes);
  request.set_version("test");
  request.set_protocol(options_.protocol);
  request.set_cluster_id(cluster_id_);
  for (const v1::TaskReport& task : tasks) {
    *request.add_tasks() = task;
  }
  v1::RegisterReply reply;
  grpc::Status status;
  for (int tries = 0; tries < 200; ++tries) {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(5));
    status = stub_->Register(&context, request, &reply);
    if (status.error_code() != grpc::StatusCode::UNAVAILABLE) {
      break;
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
  }
  RETURN_IF_ERROR(net::FromGrpc(status));
  cluster_id_ = reply.cluster_id();
  term_ = reply.term();
  checkpoint_root_ = reply.checkpoint_root();
  stream_ = std::make_unique<Stream>();
  stream_->calls = stub_->Session(&stream_->context);
  reader_ = std::thread([this] { ReadLoop(); });
  Beat();
  return reply;
}

void FakeWorker::Disconnect() {
  if (stream_ == nullptr) {
    return;
  }
  stream_->context.TryCancel();
  reader_.join();
  stream_->calls->Finish();
  stream_.reset();
}

void FakeWorker::ReadLoop() {
  v1::CoordMsg message;
  while (stream_->calls->Read(&message)) {
    const std::lock_guard lock(mutex_);
    inbox_.push_back(message);
    arrived_.notify_all();
  }
}

void FakeWorker::Send(v1::WorkerMsg message) {
  message.set_cluster_id(cluster_id_);
  message.set_term(term_);
  message.set_session(session_);
  message.set_worker_id(options_.id);
  stream_->calls->Write(message);
}

void FakeWorker::Beat() {
  v1::WorkerMsg message;
  message.mutable_heartbeat()->set_n(++beats_);
  Send(std::move(message));
}

void FakeWorker::Report(v1::TaskReport report) {
  v1::WorkerMsg message;
  *message.mutable_report() = std::move(report);
  Send(std::move(message));
}

StatusOr<v1::CoordMsg> FakeWorker::Take(const std::function<bool(const v1::CoordMsg&)>& want,
                                        int patience_ms) {
  std::unique_lock lock(mutex_);
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::milliseconds(patience_ms);
  while (true) {
    const auto found = std::find_if(inbox_.begin(), inbox_.end(), want);
    if (found != inbox_.end()) {
      v1::CoordMsg message = std::move(*found);
      inbox_.erase(found);
      return message;
    }
    if (arrived_.wait_until(lock, deadline) == std::cv_status::timeout) {
      std::string kinds;
      for (const v1::CoordMsg& message : inbox_) {
        kinds += Str(" ", static_cast<int>(message.body_case()));
      }
      return DeadlineExceeded(Str("the awaited message did not come; there are:", kinds));
    }
  }
}

v1::TaskReport FakeWorker::Next(const v1::TaskAssignment& task, v1::TaskState state) {
  v1::TaskReport report;
  report.set_job(task.job());
  report.set_fence(task.fence());
  report.set_task(task.task());
  report.set_seq(++seq_);
  report.set_state(state);
  report.set_acknowledged(true);
  report.set_data_address("127.0.0.1");
  return report;
}

StatusOr<v1::TaskAssignment> FakeWorker::RunAssigned(uint64_t start_step) {
  ASSIGN_OR_RETURN(const v1::CoordMsg assigned,
                   Take([](const v1::CoordMsg& m) { return m.has_assign(); }));
  const v1::TaskAssignment& task = assigned.assign();
  Report(Next(task, v1::TASK_STATE_PREPARING));
  Report(Next(task, v1::TASK_STATE_READY));
  ASSIGN_OR_RETURN(const v1::CoordMsg start, Take([&](const v1::CoordMsg& m) {
                     return m.has_start() && m.start().fence() == task.fence();
                   }));
  v1::TaskReport running = Next(task, v1::TASK_STATE_RUNNING);
  for (const uint32_t rank : task.ranks()) {
    running.add_joined_ranks(rank);
  }
  running.set_start_step(start_step);
  Report(std::move(running));
  return task;
}

void FakeWorker::Exit(const v1::TaskAssignment& task, int code, const std::string& category) {
  v1::TaskReport report = Next(task, v1::TASK_STATE_EXITED);
  for (const uint32_t rank : task.ranks()) {
    v1::RankOutcome* exit = report.add_exits();
    exit->set_rank(rank);
    exit->set_exit_code(code);
    exit->set_category(category);
    exit->set_at(1000 + rank);
  }
  Report(std::move(report));
}

StatusOr<std::vector<v1::ShardFile>> FakeWorker::WriteShard(const v1::TaskAssignment& task,
                                                            uint64_t step, uint32_t rank) {
  checkpoint::ShardWriterOptions options;
  options.root = checkpoint_root_;
  options.dir = Str(task.attempt_dir(), "/step-", step);
  options.header.set_format_version(checkpoint::kFormatVersion);
  options.header.set_job(task.job());
  options.header.set_fence(task.fence());
  options.header.set_step(step);
  options.header.set_rank(rank);
  options.header.set_world_size(task.world_size());
  ASSIGN_OR_RETURN(const std::unique_ptr<checkpoint::SstShardWriter> writer,
                   checkpoint::SstShardWriter::Create(options));
  RETURN_IF_ERROR(writer->Add({.tensor = 1,
                               .tensor_class = v1::TENSOR_CLASS_MASTER,
                               .chunk = 0,
                               .first = static_cast<uint32_t>(rank * kElementsPerRank)},
                              v1::ELEMENT_TYPE_F32, std::string(kElementsPerRank * 4, 'w')));
  return writer->Finish();
}

StatusOr<v1::CheckpointReply> FakeWorker::Save(const v1::TaskAssignment& task, uint64_t step) {
  v1::WorkerMsg open;
  v1::RankOpenCheckpoint* body = open.mutable_open_checkpoint();
  body->set_job(task.job());
  body->set_fence(task.fence());
  body->set_rank(0);
  body->mutable_open()->set_request(++request_);
  body->mutable_open()->set_step(step);
  body->mutable_open()->set_bytes_expected(64);
  Send(std::move(open));
  const auto reply_to = [](uint64_t request) {
    return [request](const v1::CoordMsg& m) {
      return m.has_checkpoint() && m.checkpoint().reply().request() == request;
    };
  };
  ASSIGN_OR_RETURN(v1::CoordMsg answer, Take(reply_to(request_)));
  for (const uint32_t rank : task.ranks()) {
    if (answer.checkpoint().reply().verdict() != v1::CHECKPOINT_VERDICT_OK) {
      break;
    }
    v1::WorkerMsg message;
    v1::RankSealShard* seal = message.mutable_seal_shard();
    seal->set_job(task.job());
    seal->set_fence(task.fence());
    seal->set_rank(rank);
    v1::SealShard* shard = seal->mutable_seal();
    shard->set_request(++request_);
    shard->set_step(step);
    shard->set_rank(rank);
    ASSIGN_OR_RETURN(const std::vector<v1::ShardFile> files, WriteShard(task, step, rank));
    for (const v1::ShardFile& file : files) {
      *shard->add_files() = file;
    }
    if (rank == 0) {
      v1::TensorInfo* tensor = shard->add_tensors();
      tensor->set_id(1);
      tensor->set_name("model.norm.weight");
      tensor->add_shape(static_cast<int64_t>(kElementsPerRank * task.world_size()));
      tensor->set_master_type(v1::ELEMENT_TYPE_F32);
      tensor->add_classes(v1::TENSOR_CLASS_MASTER);
      shard->mutable_train_state()->set_step(step);
    }
    Send(std::move(message));
    ASSIGN_OR_RETURN(answer, Take(reply_to(request_)));
  }
  return answer.checkpoint().reply();
}

}  // namespace heddle::test
