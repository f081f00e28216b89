// Every verb of the command line. One function per file of this folder.
#pragma once

#include <vector>

#include "cli/commands/verb.h"

namespace heddle::cli {

std::vector<Verb> ClusterVerbs();     // up.cc: up, down
std::vector<Verb> SubmitVerbs();      // submit.cc: submit, run
std::vector<Verb> PlanVerbs();        // plan.cc: plan
std::vector<Verb> BenchHostVerbs();   // bench_host.cc: bench-host
std::vector<Verb> ListVerbs();        // ps.cc: ps, status
std::vector<Verb> DescribeVerbs();    // describe.cc: describe, why
std::vector<Verb> DoctorVerbs();      // doctor.cc: doctor
std::vector<Verb> EventVerbs();       // events.cc: events
std::vector<Verb> LogVerbs();         // logs.cc: logs
std::vector<Verb> MetricVerbs();      // metrics.cc: metrics
std::vector<Verb> WaitVerbs();        // wait.cc: wait
std::vector<Verb> StopVerbs();        // stop.cc: cancel, pause, preempt, hold, release
std::vector<Verb> ResumeVerbs();      // resume.cc: resume
std::vector<Verb> CheckpointVerbs();  // ckpt.cc: ckpt ls, show, verify, pin, unpin, export
std::vector<Verb> NodeVerbs();        // node.cc: node ls, describe, cordon, drain, reopen, forget
std::vector<Verb> DataVerbs();        // data.cc: data prepare, inspect, sample, encode
std::vector<Verb> ModelVerbs();       // model.cc: model show, logits, import, export; generate
std::vector<Verb> ConfigVerbs();      // config.cc: config show, explain, presets, reference, schema
std::vector<Verb> CompletionVerbs();  // completion.cc: completion
std::vector<Verb> HelpVerbs();        // help.cc: help
std::vector<Verb> VersionVerbs();     // version.cc: version

std::vector<Verb> AllVerbs();

}  // namespace heddle::cli
