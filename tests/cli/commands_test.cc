// Tables and JSON of the verbs that read or steer a cluster, against a fake coordinator.
#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>

#include "base/clock/clock.h"
#include "tests/cli/fake_cluster.h"

namespace heddle::cli {
namespace {

using nlohmann::json;

class CommandsTest : public ::testing::Test {
 protected:
  CommandsTest() {
    v1::Job& job = fake_.job;
    job.set_account("default");
    job.set_priority(50);
    job.set_ranks(2);
    job.set_step(120);
    job.set_max_steps(300);
    job.set_loss(3.25);
    job.set_tokens_per_second(5120.5);
    job.set_restarts(1);
    job.set_submitted_at(1'795'217'400'000);
    job.set_started_at(1'795'217'401'000);
    v1::Attempt& attempt = *job.add_attempts();
    attempt.set_number(1);
    attempt.set_fence((uint64_t{7} << 40) | 9);
    attempt.set_state("ENDED");
    attempt.set_outcome("FAILED");
    attempt.add_workers("w-1");
    attempt.add_workers("w-2");
    attempt.set_last_step(100);
    attempt.mutable_cause()->set_code("RANK_KILLED");
    attempt.mutable_cause()->set_detail("rank 1: signal 9\x1B[31m");
    v1::Checkpoint& checkpoint = *fake_.checkpoint.mutable_checkpoint();
    checkpoint.set_id("j-7k2@100");
    checkpoint.set_step(100);
    checkpoint.set_fence(attempt.fence());
    checkpoint.set_state("COMMITTED");
    checkpoint.set_bytes(12'345'678'901);
    checkpoint.set_ranks(2);
    checkpoint.set_created_at(1'795'217'400'000);
    checkpoint.set_pinned(false);
    checkpoint.set_verified(true);
    *job.add_checkpoints() = checkpoint;
    v1::Event event;
    event.set_seq(41);
    event.set_at(1'795'217'400'000);
    event.set_code("ATTEMPT_ENDED");
    event.set_target("j-7k2/1");
    event.set_text("rank 1 ended by signal 9");
    fake_.events.push_back(event);
    *job.add_events() = event;
  }

  json Json(const std::vector<std::string>& words) {
    std::vector<std::string> all = words;
    all.insert(all.end(), {"-o", "json"});
    const Outcome outcome = fake_.Run(all);
    EXPECT_EQ(outcome.status, 0) << outcome.err;
    EXPECT_EQ(std::count(outcome.out.begin(), outcome.out.end(), '\n'), 1) << outcome.out;
    return json::parse(outcome.out, nullptr, false);
  }

  FakeCluster fake_;
};

TEST_F(CommandsTest, PsPrintsEveryPage) {
  const json reply = Json({"ps"});
  ASSERT_EQ(reply.at("jobs").size(), 2u);
  const json& job = reply.at("jobs").at(0);
  for (const char* field : {"id", "name", "state", "result", "reason", "account", "priority",
                            "ranks", "step", "max_steps", "loss", "tokens_per_second", "restarts",
                            "submitted_at", "started_at", "finished_at"}) {
    EXPECT_TRUE(job.contains(field)) << field;
  }
  EXPECT_EQ(job.at("loss"), 3.25);
  EXPECT_EQ(job.at("submitted_at"), 1'795'217'400'000);
  EXPECT_TRUE(job.at("finished_at").is_null());
  EXPECT_FALSE(job.contains("attempts"));
  EXPECT_EQ(reply.at("jobs").at(1).at("name"), "demo-2");
}

TEST_F(CommandsTest, PsIsATable) {
  // The age's width decides the column's: half way through a minute it is the same all day.
  fake_.job.set_submitted_at(SystemClock().NowWallMs() - 570'000);
  const Outcome outcome = fake_.Run({"ps"});
  EXPECT_EQ(
      outcome.out.rfind("ID     NAME    STATE              STEP    LOSS  TOK/S  RESTARTS    AGE\n"
                        "j-7k2  demo    ACTIVE RUNNING  120/300  3.2500   5120         1  9m3",
                        0),
      0u)
      << outcome.out;
  EXPECT_NE(fake_.Run({"ps", "-o", "wide"}).out.find("ACCOUNT"), std::string::npos);
  fake_.job.set_state("DONE");
  EXPECT_EQ(Json({"ps"}).at("jobs").size(), 0u);
  EXPECT_EQ(Json({"ps", "-a"}).at("jobs").size(), 2u);
}

TEST_F(CommandsTest, DescribeHasAttemptsCheckpointsEventsLineage) {
  const json job = Json({"describe", "j-7k2"});
  const json& attempt = job.at("attempts").at(0);
  EXPECT_EQ(attempt.at("fence"), "7696581394441") << "fences are strings";
  EXPECT_EQ(attempt.at("workers"), (std::vector<std::string>{"w-1", "w-2"}));
  EXPECT_EQ(attempt.at("cause").at("code"), "RANK_KILLED");
  EXPECT_EQ(job.at("checkpoints").at(0).at("step"), 100);
  EXPECT_EQ(job.at("events").at(0).at("seq"), 41);
  EXPECT_TRUE(job.at("lineage").is_array());
  const Outcome text = fake_.Run({"describe", "j-7k2"});
  EXPECT_NE(text.out.find("RANK_KILLED rank 1: signal 9?[31m\n"), std::string::npos)
      << "text of a process never reaches the terminal raw: " << text.out;
  EXPECT_NE(text.out.find("2026-11-20T23:30:00Z  ATTEMPT_ENDED  j-7k2/1  rank 1 ended"),
            std::string::npos);
}

TEST_F(CommandsTest, DescribeAndLogsTellWhatTheLogsLack) {
  EXPECT_EQ(fake_.Run({"describe", "j-7k2"}).out.find("missing"), std::string::npos);
  v1::LogLoss* loss = fake_.job.mutable_attempts(0)->add_log_losses();
  loss->set_rank(3);
  loss->set_over_limit(70'000);
  loss->set_lost(1'234);
  EXPECT_NE(fake_.Run({"describe", "j-7k2"})
                .out.find("log of rank 3, attempt 1: at least 71234 bytes are missing (70000 "
                          "beyond the limit of a job's logs, 1234 lost on the worker)\n"),
            std::string::npos);
  const json told = Json({"describe", "j-7k2"}).at("attempts").at(0).at("log_losses").at(0);
  EXPECT_EQ(told, (json{{"rank", 3}, {"over_limit", 70'000}, {"lost", 1'234}}));

  v1::LogLine line;
  line.set_attempt(1);
  line.set_rank(3);
  line.set_offset(10);
  line.set_data("... at least 71234 bytes are missing\n");
  line.set_lost(71'234);
  fake_.lines = {line, line};
  EXPECT_EQ(json::parse(fake_.Run({"logs", "j-7k2", "-o", "json"}).out).at("lost"), 71'234);
  v1::LogLine after;  // the worker's disk had room again
  after.set_attempt(1);
  after.set_rank(3);
  after.set_offset(10);
  after.set_data("later\n");
  fake_.lines = {line, after};
  EXPECT_EQ(fake_.Run({"logs", "j-7k2"}).out,
            "[1.3] ... at least 71234 bytes are missing\n[1.3] later\n");
}

TEST_F(CommandsTest, WhyExplains) {
  fake_.why.set_id("j-7k2");
  fake_.why.set_state("QUEUED");
  fake_.why.set_reason("COUNT");
  fake_.why.set_text("needs 8 ranks, 2 are free");
  fake_.why.set_eta_ms(1'795'217'400'000);
  fake_.why.add_blocking("j-5");
  v1::WhyReply::Funnel& step = *fake_.why.add_funnel();
  step.set_constraint("cpus >= 8");
  step.set_nodes(2);
  const json why = Json({"why", "j-7k2"});
  EXPECT_EQ(why.at("reason"), "COUNT");
  EXPECT_EQ(why.at("eta_ms"), 1'795'217'400'000);
  EXPECT_EQ(why.at("funnel").at(0), (json{{"constraint", "cpus >= 8"}, {"nodes", 2}}));
  EXPECT_EQ(why.at("blocking"), (std::vector<std::string>{"j-5"}));
  EXPECT_EQ(fake_.Run({"why", "j-7k2"}).out,
            "j-7k2 QUEUED COUNT: needs 8 ranks, 2 are free\n"
            "  2 nodes: cpus >= 8\n"
            "  behind j-5\n"
            "  expected to start 2026-11-20T23:30:00Z\n");
}

TEST_F(CommandsTest, DoctorShowsFindingsWithEvidenceAndTheRanks) {
  fake_.doctor.set_id("j-7k2");
  fake_.doctor.set_state("ACTIVE");
  fake_.doctor.set_summary("no step for 12 s: rank 1 is at #1812 all-gather block.7");
  v1::Finding& hang = *fake_.doctor.add_findings();
  hang.set_kind("HANG");
  hang.set_at(1'795'217'400'000);
  hang.set_attempt(2);
  hang.set_rank(1);
  hang.set_node("w-2");
  hang.set_step(60);
  hang.set_text("rank 1 is at #1812 all-gather block.7; rank 1 is stopped (T)");
  hang.add_evidence("stacks of rank 1 on w-2:\nthread 5 \033[31mheddle-trainer T");
  hang.set_advice("kill -CONT its process");
  v1::RankStatus& rank = *fake_.doctor.add_ranks();
  rank.set_rank(1);
  rank.set_node("w-2");
  rank.set_step(60);
  rank.set_phase("backward");
  rank.set_phase_age_ms(12'000);
  rank.set_operation("#1812 all-gather block.7");
  rank.set_process_state("stopped");
  EXPECT_EQ(fake_.Run({"doctor", "j-7k2"}).out,
            "j-7k2 ACTIVE: no step for 12 s: rank 1 is at #1812 all-gather block.7\n"
            "\n"
            "HANG (attempt 2, rank 1, w-2, step 60) 2026-11-20T23:30:00Z\n"
            "  rank 1 is at #1812 all-gather block.7; rank 1 is stopped (T)\n"
            "    stacks of rank 1 on w-2:\n"
            "      thread 5 ?[31mheddle-trainer T\n"
            "  next: kill -CONT its process\n"
            "\n"
            "RANK  NODE  STEP  PHASE     FOR  OPERATION                 WAITS  PROCESS\n"
            "   1  w-2     60  backward  12s  #1812 all-gather block.7  no     stopped\n");
  const json doctor = Json({"doctor", "j-7k2"});
  EXPECT_EQ(doctor.at("findings").at(0).at("kind"), "HANG");
  EXPECT_EQ(doctor.at("ranks").at(0).at("process_state"), "stopped");
}

// Twenty steps that read 1 GB in 2 s and wrote 0.5 GB in 1 s each; bench-host measured 2 and 1
// GB/s.
class DoctorOfADisk : public CommandsTest {
 protected:
  DoctorOfADisk() {
    fake_.doctor.set_id("j-7k2");
    fake_.doctor.set_state("ACTIVE");
    v1::Finding& slow = *fake_.doctor.add_findings();
    slow.set_kind("SLOW_OFFLOAD");
    slow.set_attempt(2);
    slow.set_rank(0);
    slow.set_node("worker-1");
    slow.set_step(40);
    for (uint64_t step = 21; step <= 40; ++step) {
      v1::MetricPoint point;
      point.set_attempt(2);
      point.set_step(step);
      v1::OffloadUse& use = *point.mutable_offload();
      use.set_bytes_read(1'000'000'000);
      use.set_read_seconds(2);
      use.set_bytes_written(500'000'000);
      use.set_write_seconds(1);
      fake_.points.push_back(point);
    }
    fake_.node.set_id("worker-1");
    fake_.node.set_host("here");
  }
  void Measured(const std::string& host) {
    std::ofstream(fake_.folder() + "/host_bench.json")
        << R"({"version":1,"threads":2,"measured_at":1,"cpu":"x","disk_dir":"/spill",)"
        << R"("disk_read_bytes":2e9,"disk_write_bytes":1e9,"host":")" << host << R"("})";
  }
  size_t Evidence() {
    return Json({"doctor", "j-7k2"}).at("findings").at(0).value("evidence", json::array()).size();
  }
};

TEST_F(DoctorOfADisk, IsComparedWithWhatWasMeasuredOnThisHost) {
  EXPECT_EQ(Evidence(), 0u) << "nothing was measured";
  Measured("elsewhere");
  EXPECT_EQ(Evidence(), 0u) << "the worker is on another host";
  Measured("here");
  const std::string text = fake_.Run({"doctor", "j-7k2"}).out;
  EXPECT_NE(text.find("the disk took 2.0 times as long as it would at the 2.00 GB/s read and 1.00 "
                      "GB/s written that heddle bench-host measured in /spill: it is slower than "
                      "measured, or others use it"),
            std::string::npos)
      << text;
  EXPECT_EQ(fake_.metrics_request.from_step(), 21u);
  // As fast as measured: the disk is what it is.
  for (v1::MetricPoint& point : fake_.points) point.mutable_offload()->set_read_seconds(1.9);
  EXPECT_EQ(Evidence(), 0u);
  // Steps of an attempt before are another matter.
  for (v1::MetricPoint& point : fake_.points) {
    point.mutable_offload()->set_read_seconds(9);
    point.set_attempt(1);
  }
  EXPECT_EQ(Evidence(), 0u);
}

TEST_F(DoctorOfADisk, FiguresThatAreNoneAreAWarningAndTheFindingStays) {
  std::ofstream(fake_.folder() + "/host_bench.json") << "{";
  const Outcome outcome = fake_.Run({"doctor", "j-7k2"});
  EXPECT_EQ(outcome.status, 0);
  EXPECT_NE(outcome.out.find("SLOW_OFFLOAD"), std::string::npos);
  EXPECT_NE(outcome.err.find("not the figures of a host: run heddle bench-host again"),
            std::string::npos)
      << outcome.err;
}

TEST_F(CommandsTest, DoctorOfAHealthyJobSaysSo) {
  fake_.doctor.set_id("j-7k2");
  fake_.doctor.set_state("DONE");
  fake_.doctor.set_summary("nothing is wrong: the job succeeded");
  EXPECT_EQ(fake_.Run({"doctor", "j-7k2"}).out,
            "j-7k2 DONE: nothing is wrong: the job succeeded\n");
  EXPECT_TRUE(Json({"doctor", "j-7k2"}).at("findings").empty());
}

TEST_F(CommandsTest, StatusOfTheCluster) {
  fake_.status.set_cluster_id("c1");
  fake_.status.set_term(4);
  fake_.status.set_role("LEADER");
  fake_.status.set_version("0.1.0");
  fake_.status.set_uptime_seconds(61);
  fake_.status.mutable_jobs()->set_queued(3);
  fake_.status.mutable_nodes()->set_connected(2);
  fake_.status.mutable_scheduler()->set_last_pass_ms(0.5);
  const json status = Json({"status"});
  for (const char* field :
       {"cluster_id", "term", "role", "version", "uptime_seconds", "jobs", "nodes", "scheduler"}) {
    EXPECT_TRUE(status.contains(field)) << field;
  }
  EXPECT_EQ(status.at("jobs").at("queued"), 3);
  EXPECT_EQ(status.at("scheduler").at("last_pass_ms"), 0.5);
  EXPECT_NE(fake_.Run({"status"}).out.find("2 connected, 0 suspect, 0 lost"), std::string::npos);
}

TEST_F(CommandsTest, EventsAndLogsAndMetricsAreLines) {
  EXPECT_EQ(json::parse(fake_.Run({"events", "j-7k2", "-o", "json"}).out).at("seq"), 41);
  EXPECT_EQ(fake_.watch_request.job(), "j-7k2");
  EXPECT_TRUE(fake_.watch_request.no_follow());
  v1::LogLine line;
  line.set_attempt(2);
  line.set_rank(1);
  line.set_offset(17);
  line.set_data("hello \x1B]0;title\x07\n");
  fake_.lines = {line};
  EXPECT_EQ(fake_.Run({"logs", "j-7k2"}).out, "[2.1] hello ?]0;title?\n");
  EXPECT_EQ(fake_.Run({"logs", "j-7k2", "--rank", "1", "--tail", "5", "--attempt", "2"}).out,
            "hello ?]0;title?\n");
  EXPECT_EQ(fake_.logs_request.rank(), 1);
  EXPECT_EQ(fake_.logs_request.tail(), 5);
  EXPECT_EQ(fake_.logs_request.attempt(), 2u);
  const json log = json::parse(fake_.Run({"logs", "j-7k2", "-o", "json"}).out);
  EXPECT_EQ(log.at("text"), "hello \x1B]0;title\x07\n") << "JSON keeps the bytes";
  v1::MetricPoint point;
  point.set_step(3);
  point.set_loss(2.5);
  point.set_batch_hash(0xFFFFFFFFFFFFFFFE);
  point.set_attempt(1);
  fake_.points = {point, point};
  fake_.points[1].set_step(4);
  const Outcome metrics = fake_.Run({"metrics", "j-7k2", "--from", "4", "-o", "json"});
  const json last = json::parse(metrics.out);
  EXPECT_EQ(last.at("step"), 4);
  EXPECT_EQ(last.at("batch_hash"), "18446744073709551614");
  for (const char* field :
       {"grad_norm", "learning_rate", "tokens", "tokens_per_second", "step_seconds", "attempt"}) {
    EXPECT_TRUE(last.contains(field)) << field;
  }
}

TEST_F(CommandsTest, WaitEndsLikeTheJob) {
  fake_.history = {fake_.job};
  fake_.job.set_state("DONE");
  fake_.job.set_result("SUCCEEDED");
  EXPECT_EQ(fake_.Run({"wait", "j-7k2"}).status, 0);
  fake_.job.set_result("TIMED_OUT");
  const Outcome outcome = fake_.Run({"wait", "j-7k2"});
  EXPECT_EQ(outcome.status, 1);
  EXPECT_EQ(outcome.out, "j-7k2 DONE TIMED_OUT\n");
  fake_.job.set_state("QUEUED");
  fake_.job.clear_phase();
  const Outcome late = fake_.Run({"wait", "j-7k2", "--timeout", "250ms"});
  EXPECT_EQ(late.status, 4);
  EXPECT_NE(late.err.find("is QUEUED after the time given"), std::string::npos) << late.err;
  EXPECT_EQ(fake_.Run({"wait", "j-7k2", "--for", "lunch"}).status, 2);
}

TEST_F(CommandsTest, StoppingVerbsSayWhatTheyWant) {
  EXPECT_EQ(fake_.Run({"pause", "j-7k2", "--grace", "1m", "--reason", "lunch"}).status, 0);
  EXPECT_EQ(fake_.Run({"cancel", "j-7k2"}).out, "j-7k2 ACTIVE RUNNING\n");
  EXPECT_EQ(fake_.Run({"preempt", "j-7k2", "--request-id", "r"}).status, 0);
  ASSERT_EQ(fake_.stops.size(), 3u);
  EXPECT_EQ(fake_.stops[0].verb(), v1::STOP_VERB_PAUSE);
  EXPECT_EQ(fake_.stops[0].grace_ms(), 60'000);
  EXPECT_EQ(fake_.stops[0].reason(), "lunch");
  EXPECT_EQ(fake_.stops[1].verb(), v1::STOP_VERB_CANCEL);
  EXPECT_FALSE(fake_.stops[1].has_grace_ms());
  EXPECT_EQ(fake_.stops[2].request_id(), "r");
  EXPECT_EQ(fake_.Run({"cancel", "j-7k2", "--grace", "soon"}).status, 2);
  EXPECT_EQ(fake_.Run({"cancel", "j-none"}).status, 3);
  fake_.job.clear_phase();
  EXPECT_EQ(fake_.Run({"hold", "j-7k2"}).out, "j-7k2 HELD\n");
  EXPECT_EQ(fake_.Run({"release", "j-7k2"}).out, "j-7k2 QUEUED\n");
}

TEST_F(CommandsTest, Checkpoints) {
  const json list = Json({"ckpt", "ls", "j-7k2"});
  const json& checkpoint = list.at("checkpoints").at(0);
  EXPECT_EQ(checkpoint.at("bytes"), 12'345'678'901);
  EXPECT_EQ(checkpoint.at("fence"), "7696581394441");
  EXPECT_EQ(checkpoint.at("pinned"), false);
  EXPECT_TRUE(checkpoint.at("parent").is_null());
  EXPECT_EQ(fake_.Run({"ckpt", "ls", "j-7k2"}).out,
            "CHECKPOINT  STATE              FENCE  RANKS        BYTES               CREATED  "
            "PARENT  FLAGS\n"
            "j-7k2@100   COMMITTED  7696581394441      2  12345678901  2026-11-20T23:30:00Z  "
            "-       verified\n");
  EXPECT_EQ(Json({"ckpt", "pin", "j-7k2@100"}).at("pinned"), true);
  EXPECT_EQ(Json({"ckpt", "unpin", "j-7k2@100"}).at("pinned"), false);
  EXPECT_EQ(Json({"ckpt", "show", "j-7k2@100"}).at("checkpoint").at("id"), "j-7k2@100");
  fake_.verify.set_ok(true);
  fake_.verify.set_files(3);
  EXPECT_EQ(fake_.Run({"ckpt", "verify", "j-7k2@100"}).status, 0);
  fake_.verify.set_ok(false);
  fake_.verify.add_problems("rank-0-0.sst: digest differs");
  const Outcome bad = fake_.Run({"ckpt", "verify", "j-7k2@100"});
  EXPECT_EQ(bad.status, 1);
  EXPECT_EQ(bad.err, "heddle: ckpt verify: j-7k2@100: rank-0-0.sst: digest differs\n");
}

TEST_F(CommandsTest, Nodes) {
  fake_.node.set_id("w-1");
  fake_.node.set_host("box");
  fake_.node.set_state("CONNECTED");
  fake_.node.set_admin("OPEN");
  fake_.node.set_health("OK");
  fake_.node.set_cpus(2);
  fake_.node.set_memory_bytes(uint64_t{4} << 30);
  fake_.node.set_gpus(0);
  fake_.node.set_ranks_running(1);
  fake_.node.set_last_heartbeat_ms(900);
  const json node = Json({"node", "ls"}).at("nodes").at(0);
  for (const char* field : {"id", "host", "state", "admin", "health", "cpus", "memory_bytes",
                            "gpus", "ranks_running", "last_heartbeat_ms"}) {
    EXPECT_FALSE(node.at(field).is_null()) << field;
  }
  EXPECT_EQ(fake_.Run({"node", "describe", "w-1"}).status, 0);
  EXPECT_EQ(fake_.Run({"node", "describe", "w-1"}).out.find("until"), std::string::npos);
  EXPECT_EQ(fake_.Run({"node", "drain", "w-1", "--grace", "30s", "--reason", "disk"}).status, 0);
  EXPECT_EQ(fake_.Run({"node", "cordon", "w-1"}).status, 0);
  EXPECT_EQ(fake_.Run({"node", "reopen", "w-1"}).status, 0);
  ASSERT_EQ(fake_.admins.size(), 3u);
  EXPECT_EQ(fake_.admins[0].verb(), v1::NODE_VERB_DRAIN);
  EXPECT_EQ(fake_.admins[0].grace_ms(), 30'000);
  EXPECT_EQ(fake_.admins[0].reason(), "disk");
  EXPECT_EQ(fake_.admins[2].verb(), v1::NODE_VERB_REOPEN);
}

TEST_F(CommandsTest, ANodeInQuarantineTellsWhyUntilWhenAndHowToEndIt) {
  fake_.node.set_id("w-1");
  fake_.node.set_health("QUARANTINED");
  fake_.node.set_health_reason("3 failures in 24 h, last STORAGE_ERROR");
  fake_.node.set_quarantined_until_ms(1'795'210'205'000);
  const std::string text = fake_.Run({"node", "describe", "w-1"}).out;
  EXPECT_NE(text.find("3 failures in 24 h, last STORAGE_ERROR"), std::string::npos) << text;
  EXPECT_NE(text.find("2026-11-20T21:30:05Z"), std::string::npos) << text;
  EXPECT_NE(text.find("heddle node reopen w-1"), std::string::npos) << text;
}

TEST_F(CommandsTest, FollowedStreamsGoOnAfterARestartWithoutARepeat) {
  v1::LogLine line;
  for (int i = 0; i < 2; ++i) {
    line.set_attempt(1);
    line.set_offset(static_cast<uint64_t>(i) * 4);
    line.set_data(i == 0 ? "one\n" : "two\n");
    fake_.lines.push_back(line);
  }
  v1::MetricPoint point;
  for (const auto& [attempt, step] : {std::pair{1, 4}, {1, 5}, {2, 5}}) {
    point.set_attempt(static_cast<uint32_t>(attempt));
    point.set_step(static_cast<uint64_t>(step));
    fake_.points.push_back(point);
  }
  fake_.broken_streams = 2;
  const Outcome logs = fake_.Run({"logs", "j-7k2", "-f", "--tail", "9"});
  EXPECT_EQ(logs.status, 0) << logs.err;
  EXPECT_EQ(logs.out, "[1.0] one\n[1.0] two\n");
  EXPECT_EQ(std::count(logs.err.begin(), logs.err.end(), '\n'), 1) << logs.err;
  EXPECT_NE(logs.err.find("does not answer"), std::string::npos) << logs.err;
  EXPECT_FALSE(fake_.logs_request.has_tail()) << "more than the tail may be new";
  fake_.broken_streams = 2;
  const Outcome metrics = fake_.Run({"metrics", "j-7k2", "-f"});
  EXPECT_EQ(metrics.status, 0) << metrics.err;
  EXPECT_EQ(std::count(metrics.out.begin(), metrics.out.end(), '\n'), 3) << metrics.out;
  EXPECT_EQ(std::count(metrics.err.begin(), metrics.err.end(), '\n'), 1) << metrics.err;
  fake_.broken_streams = 1;
  EXPECT_EQ(fake_.Run({"logs", "j-7k2"}).status, 4) << "without -f a break is an error";
}

TEST_F(CommandsTest, LogsOfARankOrAttemptThatIsNotThereAreAnError) {
  const Outcome rank = fake_.Run({"logs", "j-7k2", "--rank", "99"});
  EXPECT_EQ(rank.status, 3);
  EXPECT_EQ(rank.err, "heddle: logs: job j-7k2 has no rank 99: it has 2, counted from 0\n");
  const Outcome attempt = fake_.Run({"logs", "j-7k2", "--attempt", "99"});
  EXPECT_EQ(attempt.status, 3);
  EXPECT_EQ(attempt.err, "heddle: logs: job j-7k2 has no attempt 99: the newest is 1\n");
}

TEST_F(CommandsTest, LogsSayThatALargeJobSendsThoseOfSomeRanksOnly) {
  fake_.lines.clear();
  EXPECT_EQ(fake_.Run({"logs", "j-7k2", "--rank", "1"}).err, "");
  fake_.job.set_ranks(65);
  const Outcome outcome = fake_.Run({"logs", "j-7k2", "--rank", "1"});
  EXPECT_EQ(outcome.status, 0);
  EXPECT_EQ(outcome.err,
            "heddle: logs: no log of rank 1: a job of more than 64 ranks sends those of rank 0 and "
            "of ranks that failed\n");
  EXPECT_EQ(fake_.Run({"logs", "j-7k2", "--rank", "0"}).err, "");
}

TEST_F(CommandsTest, LogsRefuseNumbersThatMeanNothing) {
  const Outcome tail = fake_.Run({"logs", "j-7k2", "--tail", "-1"});
  EXPECT_EQ(tail.status, 2);
  EXPECT_EQ(tail.err, "heddle: logs: --tail -1: must be 0 .. 2147483647\n");
  for (const std::vector<std::string>& words :
       {std::vector<std::string>{"--tail=-9"}, std::vector<std::string>{"--rank", "-1"},
        std::vector<std::string>{"--attempt", "0"},
        std::vector<std::string>{"--attempt", "4294967297"}}) {
    std::vector<std::string> all = {"logs", "j-7k2"};
    all.insert(all.end(), words.begin(), words.end());
    EXPECT_EQ(fake_.Run(all).status, 2) << words[0];
  }
  EXPECT_EQ(fake_.Run({"logs", "j-7k2", "--tail", "0"}).status, 0);
  EXPECT_EQ(fake_.logs_request.tail(), 0);
  EXPECT_TRUE(fake_.logs_request.has_tail());
  EXPECT_FALSE(fake_.logs_request.has_rank());
}

TEST_F(CommandsTest, EncodeReadsRegularFilesOnly) {
  const std::string file = fake_.folder() + "/text";
  std::ofstream(file) << "{}";
  const Outcome endless =
      fake_.Run({"data", "encode", "--tokenizer", "/dev/zero", "--input", file});
  EXPECT_EQ(endless.status, 2);
  EXPECT_EQ(endless.err, "heddle: data encode: tokenizer /dev/zero: not a regular file\n");
  const std::string tokenizer = fake_.folder() + "/tokenizer.json";
  std::ofstream(tokenizer) << R"({"model":{"type":"BPE","vocab":{"a":0},"merges":[]}})";
  const Outcome folder = fake_.Run({"data", "encode", "--tokenizer", tokenizer, "--input", "/etc"});
  EXPECT_EQ(folder.status, 2);
  EXPECT_NE(folder.err.find("not a regular file"), std::string::npos) << folder.err;
}

TEST_F(CommandsTest, LostOutputIsAnError) {
  std::cout.setstate(std::ios::badbit);  // as a full disk does
  const Outcome outcome = fake_.Run({"version"});
  std::cout.clear();
  EXPECT_EQ(outcome.status, 1);
  EXPECT_EQ(outcome.err, "heddle: version: cannot write to standard output\n");
}

TEST_F(CommandsTest, ServerErrorsKeepTheirTextAndStatus) {
  EXPECT_EQ(fake_.Run({"describe", "j-none"}).status, 3);
  EXPECT_EQ(fake_.Run({"describe", "j-none"}).err, "heddle: describe: no job j-none\n");
  fake_.failure = PermissionDenied("not yours");
  EXPECT_EQ(fake_.Run({"cancel", "j-7k2"}).status, 5);
  fake_.failure = FailedPrecondition("job is DONE");
  EXPECT_EQ(fake_.Run({"pause", "j-7k2"}).status, 6);
}

TEST_F(CommandsTest, WithoutACoordinatorSaysWhatToDo) {
  const Outcome none = fake_.Run({"ps"}, /*bare=*/true);
  EXPECT_EQ(none.status, 4);
  EXPECT_NE(none.err.find("start a local cluster with `heddle up`"), std::string::npos) << none.err;
  const Outcome dead = fake_.Run(
      {"ps", "--coordinator", "unix:" + fake_.folder() + "/none.sock", "--timeout", "300ms"});
  EXPECT_EQ(dead.status, 4);
  EXPECT_NE(dead.err.find("does not answer"), std::string::npos) << dead.err;
  EXPECT_EQ(fake_.Run({"ps", "--coordinator", "nonsense"}).status, 2);
  EXPECT_EQ(fake_.Run({"down"}, true).status, 3);
}

}  // namespace
}  // namespace heddle::cli
