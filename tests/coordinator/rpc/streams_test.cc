// Watch, metrics and logs: history and then what happens, without gap or repeat, over restarts.
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/stat.h>

#include <filesystem>
#include <thread>

#include "base/net/grpc_channel.h"
#include "tests/coordinator/support/coordinator_process.h"
#include "tests/coordinator/support/fake_worker.h"
#include "tests/support/status_matchers.h"

namespace heddle::test {
namespace {

class Streams : public ::testing::Test {
 protected:
  void SetUp() override {
    ASSERT_OK(process_.Start());
    jobs_ = process_.Jobs();
  }
  std::string Held() {
    v1::SubmitRequest request = CommandJob("watched");
    request.set_hold(true);
    return *Submit(*jobs_, request);
  }
  // Reads events up to `last` from `from` on; checks that they are dense.
  void ExpectDense(uint64_t from, uint64_t last) {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(20));
    v1::WatchRequest request;
    request.set_from_seq(from);
    const auto reader = jobs_->Watch(&context, request);
    v1::WatchFrame frame;
    uint64_t expected = from;
    while (expected <= last && reader->Read(&frame)) {
      ASSERT_NE(frame.kind(), v1::WatchFrame::KIND_RESYNC);
      if (frame.kind() == v1::WatchFrame::KIND_EVENT) {
        ASSERT_EQ(frame.seq(), expected);
        ASSERT_EQ(frame.event().seq(), expected);
        ++expected;
      }
    }
    EXPECT_EQ(expected, last + 1) << "the stream ended early";
    context.TryCancel();
    reader->Finish();
  }

  CoordinatorProcess process_;
  std::unique_ptr<v1::Jobs::Stub> jobs_;
};

TEST_F(Streams, WatchResumesAtAnySequenceNumberWhileEventsHappen) {
  for (int i = 0; i < 600; ++i) {  // more than one piece of history
    Held();
  }
  std::thread submitter([this] {
    const std::unique_ptr<v1::Jobs::Stub> jobs = process_.Jobs();
    for (int i = 0; i < 200; ++i) {
      v1::SubmitRequest request = CommandJob("live");
      request.set_hold(true);
      EXPECT_OK(Submit(*jobs, request));
    }
  });
  // COORDINATOR_STARTED and one event a submit.
  for (const uint64_t from : {uint64_t{1}, uint64_t{2}, uint64_t{590}, uint64_t{650}}) {
    ExpectDense(from, 801);
  }
  submitter.join();
}

TEST_F(Streams, WatchGoesOnAfterARestartWhereItStopped) {
  for (int i = 0; i < 10; ++i) {
    Held();
  }
  ExpectDense(1, 5);
  process_.End(SIGKILL);
  ASSERT_OK(process_.Start());
  ExpectDense(6, 12);  // the second COORDINATOR_STARTED is 12
}

TEST_F(Streams, WatchOfOneJobShowsOnlyItAndItsState) {
  const std::string first = Held();
  const std::string second = Held();
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(20));
  v1::WatchRequest request;
  request.set_from_seq(1);
  request.set_job(second);
  const auto reader = jobs_->Watch(&context, request);
  v1::WatchFrame frame;
  ASSERT_TRUE(reader->Read(&frame));
  EXPECT_EQ(frame.event().target(), second);
  EXPECT_EQ(frame.job().id(), second);
  EXPECT_EQ(frame.job().state(), "HELD");
  ASSERT_TRUE(reader->Read(&frame));
  EXPECT_EQ(frame.kind(), v1::WatchFrame::KIND_HEARTBEAT);
  context.TryCancel();
  reader->Finish();
}

TEST_F(Streams, AReaderThatNeverReadsCostsNobodyElse) {
  std::vector<std::unique_ptr<grpc::ClientContext>> contexts;
  std::vector<std::unique_ptr<grpc::ClientReader<v1::WatchFrame>>> readers;
  for (int i = 0; i < 20; ++i) {
    contexts.push_back(std::make_unique<grpc::ClientContext>());
    v1::WatchRequest request;
    request.set_from_seq(1);
    readers.push_back(jobs_->Watch(contexts.back().get(), request));
  }
  const int64_t before = process_.ResidentKib();
  for (int i = 0; i < 2000; ++i) {
    Held();
  }
  // 20 queues of at most 1,024 frames, and 2,000 jobs.
  EXPECT_LT(process_.ResidentKib() - before, 120 * 1024);
  for (size_t i = 0; i < readers.size(); ++i) {
    contexts[i]->TryCancel();
    readers[i]->Finish();
  }
  EXPECT_OK(GetJob(*jobs_, Held()));
}

std::vector<v1::MetricPoint> ReadPoints(v1::Jobs::Stub& jobs, const std::string& id, bool follow) {
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(20));
  v1::MetricsRequest request;
  request.set_job(id);
  request.set_follow(follow);
  const auto reader = jobs.Metrics(&context, request);
  std::vector<v1::MetricPoint> points;
  for (v1::MetricPoint point; reader->Read(&point);) {
    points.push_back(point);
  }
  EXPECT_OK(net::FromGrpc(reader->Finish()));
  return points;
}

void SendPoints(FakeWorker& worker, const v1::TaskAssignment& task, uint64_t first, uint64_t last) {
  v1::WorkerMsg message;
  message.mutable_points()->set_job(task.job());
  message.mutable_points()->set_fence(task.fence());
  for (uint64_t step = first; step <= last; ++step) {
    v1::MetricPoint* point = message.mutable_points()->add_points();
    point->set_step(step);
    point->set_loss(10.0 / static_cast<double>(step));
  }
  worker.Send(std::move(message));
}

TEST_F(Streams, MetricsFollowAcrossARestartAndRepeatNoStepOfAnAttempt) {
  FakeWorker worker(process_.Channel(), {});
  ASSERT_OK(worker.Connect());
  const std::string id = *Submit(*jobs_, TrainJob("metrics", 1));
  const StatusOr<v1::TaskAssignment> first = worker.RunAssigned();
  ASSERT_OK(first);
  SendPoints(worker, *first, 1, 6);
  SendPoints(worker, *first, 4, 8);  // sent again after a broken stream
  ASSERT_OK(worker.Save(*first, 5));
  std::vector<v1::MetricPoint> followed;
  std::thread follower([&] { followed = ReadPoints(*process_.Jobs(), id, true); });
  worker.Exit(*first, 86, "NETWORK");
  const StatusOr<v1::TaskAssignment> second = worker.RunAssigned(5);
  ASSERT_OK(second);
  SendPoints(worker, *second, 6, 10);
  worker.Exit(*second, 0);
  follower.join();
  const std::vector<v1::MetricPoint> stored = ReadPoints(*jobs_, id, false);
  for (const std::vector<v1::MetricPoint>& points : {stored, followed}) {
    ASSERT_EQ(points.size(), 13u);
    for (size_t i = 0; i < points.size(); ++i) {
      EXPECT_EQ(points[i].attempt(), i < 8 ? 1u : 2u);
      EXPECT_EQ(points[i].step(), i < 8 ? i + 1 : i - 2);
    }
  }
}

class LogShipper {
 public:
  explicit LogShipper(const std::shared_ptr<grpc::Channel>& channel)
      : stub_(v1::WorkerLink::NewStub(channel)), stream_(stub_->AppendLogs(&context_)) {}
  ~LogShipper() {
    stream_->WritesDone();
    stream_->Finish();
  }
  uint64_t Ship(const v1::TaskAssignment& task, uint64_t offset, const std::string& data,
                uint64_t lost = 0) {
    v1::LogChunk chunk;
    chunk.set_job(task.job());
    chunk.set_fence(task.fence());
    chunk.set_attempt(task.attempt());
    chunk.set_rank(0);
    chunk.set_offset(offset);
    chunk.set_data(data);
    if (lost > 0) chunk.set_lost(lost);
    stream_->Write(chunk);
    v1::LogAck ack;
    return stream_->Read(&ack) ? ack.next_offset() : ~uint64_t{0};
  }

 private:
  std::unique_ptr<v1::WorkerLink::Stub> stub_;
  grpc::ClientContext context_;
  std::unique_ptr<grpc::ClientReaderWriter<v1::LogChunk, v1::LogAck>> stream_;
};

TEST_F(Streams, LogsComeOnceByOffsetAndOnlyUnderTheirFence) {
  FakeWorker worker(process_.Channel(), {});
  ASSERT_OK(worker.Connect());
  const std::string id = *Submit(*jobs_, TrainJob("logs", 1));
  const StatusOr<v1::TaskAssignment> task = worker.RunAssigned();
  ASSERT_OK(task);
  LogShipper shipper(process_.Channel());
  EXPECT_EQ(shipper.Ship(*task, 0, "one\ntwo\n"), 8u);
  EXPECT_EQ(shipper.Ship(*task, 4, "two\nthree\n"), 14u) << "overlap is dropped";
  EXPECT_EQ(shipper.Ship(*task, 100, "gap\n"), 14u) << "a gap is refused";
  v1::TaskAssignment zombie = *task;
  zombie.set_fence(task->fence() + 1);
  shipper.Ship(zombie, 14, "stale\n");
  std::string followed;
  std::thread follower([&] {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(20));
    v1::LogsRequest request;
    request.set_job(id);
    request.set_follow(true);
    const std::unique_ptr<v1::Jobs::Stub> jobs = process_.Jobs();
    const auto reader = jobs->Logs(&context, request);
    for (v1::LogLine line; reader->Read(&line);) {
      followed += line.data();
    }
    EXPECT_OK(net::FromGrpc(reader->Finish()));
  });
  EXPECT_EQ(shipper.Ship(*task, 14, "four\n"), 19u);
  worker.Exit(*task, 0);
  ASSERT_OK(WaitForState(*jobs_, id, "DONE"));
  follower.join();
  EXPECT_EQ(followed, "one\ntwo\nthree\nfour\n");

  grpc::ClientContext context;
  v1::LogsRequest tail;
  tail.set_job(id);
  tail.set_tail(2);
  const auto reader = jobs_->Logs(&context, tail);
  std::string last;
  for (v1::LogLine line; reader->Read(&line);) {
    last += line.data();
  }
  reader->Finish();
  EXPECT_EQ(last, "three\nfour\n");
}

TEST_F(Streams, LogsAndDescribeTellWhatTheWorkerLost) {
  FakeWorker worker(process_.Channel(), {});
  ASSERT_OK(worker.Connect());
  const std::string id = *Submit(*jobs_, TrainJob("logs", 1));
  const StatusOr<v1::TaskAssignment> task = worker.RunAssigned();
  ASSERT_OK(task);
  LogShipper shipper(process_.Channel());
  EXPECT_EQ(shipper.Ship(*task, 0, "one\n"), 4u);
  v1::JobRef ref;
  ref.set_job(id);
  const auto losses = [&] {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(20));
    v1::Job job;
    EXPECT_OK(net::FromGrpc(jobs_->Get(&context, ref, &job)));
    return job.attempts(0).log_losses();
  };
  EXPECT_EQ(losses().size(), 0);
  EXPECT_EQ(shipper.Ship(*task, 4, "", 1234), 4u);
  EXPECT_EQ(shipper.Ship(*task, 4, "two\n"), 8u) << "the disk has room again";
  ASSERT_EQ(losses().size(), 1);
  EXPECT_EQ(losses()[0].rank(), 0u);
  EXPECT_EQ(losses()[0].lost(), 1234u);
  EXPECT_EQ(losses()[0].over_limit(), 0u);

  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(20));
  v1::LogsRequest request;
  request.set_job(id);
  const auto reader = jobs_->Logs(&context, request);
  std::string text;
  uint64_t lost = 0;
  for (v1::LogLine line; reader->Read(&line);) {
    text += line.data();
    lost += line.lost();
  }
  EXPECT_OK(net::FromGrpc(reader->Finish()));
  EXPECT_EQ(text,
            "one\ntwo\n... at least 1234 bytes are missing: lost on the worker (its log "
            "limit or a full disk)\n");
  EXPECT_EQ(lost, 1234u);
}

TEST_F(Streams, OldJobsKeepTheirRecordsAndLastPointButNoLogsAndSeries) {
  FakeWorker worker(process_.Channel(), {});
  ASSERT_OK(worker.Connect());
  std::string ids[2];
  for (std::string& id : ids) {
    id = *Submit(*jobs_, TrainJob("old", 1));
    const StatusOr<v1::TaskAssignment> task = worker.RunAssigned();
    ASSERT_OK(task);
    SendPoints(worker, *task, 1, 6);
    EXPECT_EQ(LogShipper(process_.Channel()).Ship(*task, 0, "words\n"), 6u);
    if (&id == &ids[0]) {
      worker.Exit(*task, 0);
      ASSERT_OK(WaitForState(*jobs_, id, "DONE"));
    }
  }
  EXPECT_EQ(ReadPoints(*jobs_, ids[0], false).size(), 6u);
  process_.End(SIGKILL);
  ASSERT_OK(process_.Start({"--keep-finished", "1s"}));
  const auto log = [&](int job) { return process_.state() + "/logs/" + ids[job]; };
  for (int i = 0; i < 500 && std::filesystem::exists(log(0)); ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
  EXPECT_FALSE(std::filesystem::exists(log(0)));
  const std::vector<v1::MetricPoint> points = ReadPoints(*jobs_, ids[0], false);
  ASSERT_EQ(points.size(), 1u);
  EXPECT_EQ(points[0].step(), 6u);
  const StatusOr<v1::Job> old = GetJob(*jobs_, ids[0]);
  ASSERT_OK(old);
  EXPECT_EQ(old->result(), "SUCCEEDED");
  EXPECT_DOUBLE_EQ(old->loss(), 10.0 / 6);
  EXPECT_EQ(old->attempts_size(), 1);
  EXPECT_GT(old->events_size(), 3);
  EXPECT_TRUE(std::filesystem::exists(log(1))) << "it runs";
  EXPECT_EQ(ReadPoints(*jobs_, ids[1], false).size(), 6u);
}

// A fifo in place of a checkpoint's file: whoever reads it waits.
TEST_F(Streams, NobodyWaitsForChecksOfCheckpoints) {
  FakeWorker worker(process_.Channel(), {});
  ASSERT_OK(worker.Connect());
  const std::string id = *Submit(*jobs_, TrainJob("large", 1));
  const StatusOr<v1::TaskAssignment> task = worker.RunAssigned();
  ASSERT_OK(task);
  ASSERT_OK(worker.Save(*task, 5));
  std::string file;
  for (const auto& entry :
       std::filesystem::recursive_directory_iterator(process_.state() + "/checkpoints")) {
    if (entry.path().extension() == ".sst") file = entry.path();
  }
  ASSERT_TRUE(std::filesystem::remove(file));
  ASSERT_EQ(mkfifo(file.c_str(), 0600), 0);
  std::vector<std::thread> checks;
  for (int i = 0; i < 3; ++i) {
    checks.emplace_back([&] {
      grpc::ClientContext context;
      v1::CheckpointRef ref;
      ref.set_checkpoint(id + "@5");
      v1::VerifyReply reply;
      process_.Checkpoints()->Verify(&context, ref, &reply);
    });
  }
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(5));
  v1::JobRef ref;
  ref.set_job(id);
  v1::Job job;
  EXPECT_OK(net::FromGrpc(jobs_->Get(&context, ref, &job)));
  std::filesystem::remove(file);  // the next checks find nothing
  process_.End(SIGKILL);
  for (std::thread& check : checks) check.join();
}

TEST_F(Streams, DescribeShowsTheNewestOfVeryManyAttempts) {
  FakeWorker worker(process_.Channel(), {});
  ASSERT_OK(worker.Connect());
  const std::string id = *Submit(*jobs_, TrainJob("restless", 1));
  constexpr uint32_t kAttempts = 203;
  for (uint32_t i = 0; i < kAttempts; ++i) {
    const StatusOr<v1::TaskAssignment> task = worker.RunAssigned();
    ASSERT_OK(task);
    worker.Exit(*task, 1, "CONTROL_PLANE");  // burns no budget
  }
  const StatusOr<v1::TaskAssignment> last = worker.RunAssigned();
  ASSERT_OK(last);
  const StatusOr<v1::Job> job = GetJob(*jobs_, id);
  ASSERT_OK(job);
  EXPECT_EQ(job->restarts(), kAttempts);
  ASSERT_EQ(job->attempts_size(), 200);
  EXPECT_EQ(job->attempts(199).number(), kAttempts + 1);
  EXPECT_EQ(job->attempts(0).number(), kAttempts - 198);
}

TEST_F(Streams, NodesThatLeftLongAgoAreForgottenUnlessSomebodyClosedThem) {
  FakeWorker open(process_.Channel(), {.id = "open"});
  FakeWorker closed(process_.Channel(), {.id = "closed"});
  for (FakeWorker* worker : {&open, &closed}) {
    ASSERT_OK(worker->Connect());
  }
  v1::NodeAdminRequest cordon;
  cordon.set_node("closed");
  cordon.set_verb(v1::NODE_VERB_CORDON);
  v1::Node node;
  grpc::ClientContext context;
  const std::unique_ptr<v1::Nodes::Stub> nodes = process_.Nodes();
  ASSERT_OK(net::FromGrpc(nodes->Administer(&context, cordon, &node)));
  for (FakeWorker* worker : {&open, &closed}) {
    v1::WorkerMsg leave;
    leave.mutable_leave()->set_reason("SIGTERM");
    worker->Send(std::move(leave));
  }
  const auto known = [&] {
    grpc::ClientContext listing;
    v1::NodeList list;
    EXPECT_OK(net::FromGrpc(nodes->List(&listing, {}, &list)));
    std::string text;
    for (const v1::Node& one : list.nodes()) text += one.id() + " " + one.state() + " ";
    return text;
  };
  const auto become = [&](const std::string& wanted) {
    for (int i = 0; i < 500 && known() != wanted; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
    }
    EXPECT_EQ(known(), wanted);
  };
  become("closed LEFT open LEFT ");
  process_.End(SIGKILL);
  ASSERT_OK(process_.Start({"--keep-finished", "1s"}));
  become("closed LEFT ");
}

// The file waits on the disk, not in the coordinator's memory.
TEST_F(Streams, ASlowReaderOfLogsQueuesABoundedPart) {
  FakeWorker worker(process_.Channel(), {});
  ASSERT_OK(worker.Connect());
  const std::string id = *Submit(*jobs_, TrainJob("logs", 1));
  const StatusOr<v1::TaskAssignment> task = worker.RunAssigned();
  ASSERT_OK(task);
  std::string chunk;
  while (chunk.size() < 1'000'000) {
    chunk += std::string(199, 'x') + "\n";
  }
  constexpr uint64_t kChunks = 32;
  LogShipper shipper(process_.Channel());
  for (uint64_t i = 0; i < kChunks; ++i) {
    ASSERT_EQ(shipper.Ship(*task, i * chunk.size(), chunk), (i + 1) * chunk.size());
  }
  const int64_t before = process_.ResidentKib();
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(120));
  v1::LogsRequest request;
  request.set_job(id);
  const std::unique_ptr<v1::Jobs::Stub> jobs = process_.Jobs();
  const auto reader = jobs->Logs(&context, request);
  v1::LogLine line;
  ASSERT_TRUE(reader->Read(&line));
  std::this_thread::sleep_for(std::chrono::seconds(2));
  EXPECT_LT(process_.ResidentKib() - before, 16 * 1024) << "32 MB wait, about 1 MiB is queued";
  shipper.Ship(*task, kChunks * chunk.size(), chunk);  // too late for who does not follow
  uint64_t next = line.data().size();
  while (reader->Read(&line)) {
    ASSERT_EQ(line.offset(), next);
    next += line.data().size();
  }
  EXPECT_OK(net::FromGrpc(reader->Finish()));
  EXPECT_EQ(next, kChunks * chunk.size()) << "all of it comes, once";
}

}  // namespace
}  // namespace heddle::test
