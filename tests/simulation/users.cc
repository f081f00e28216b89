#include "tests/simulation/users.h"

#include <memory>

namespace heddle::simulation {

namespace v1 = heddle::v1;

void Users::Call(std::function<state::Event()> make,
                 std::function<void(const state::Outcome&)> done, int tries) {
  struct Once {
    bool answered = false;
  };
  const auto once = std::make_shared<Once>();
  ++pending_;
  const auto answer = [this, once, done](const state::Outcome& outcome) {
    if (!once->answered) {
      once->answered = true;
      --pending_;
      done(outcome);
    }
  };
  // One attempt, and the next unless it was answered.
  const auto attempt = std::make_shared<std::function<void(int)>>();
  *attempt = [this, once, make, answer, attempt, weak = std::weak_ptr(attempt)](int left) {
    if (once->answered) {
      return;
    }
    if (left == 0) {
      once->answered = true;
      --pending_;
      return;
    }
    network_.Send("user", kCoordinator, [this, make, answer] {
      coordinator_.Post(make(), [this, answer](const state::Outcome& outcome) {
        network_.Send(kCoordinator, "user", [answer, outcome] { answer(outcome); });
      });
    });
    world_.After(world_.Between(1'000, 4'000), [attempt, left] { (*attempt)(left - 1); });
  };
  (*attempt)(tries);
}

v1::RunConfig Users::MakeConfig(int number) {
  v1::RunConfig config;
  config.set_name(Str("submit-", number));
  if (world_.Chance(0.25)) {
    config.set_kind(v1::RunConfig::KIND_COMMAND);
    config.mutable_command()->add_argv("true");
  }
  const int ranks = static_cast<int>(
      world_.Chance(0.05) ? plan_.workers * plan_.cpus + 1
                          : world_.Between(1, std::min(4, plan_.workers * plan_.cpus)));
  config.mutable_parallel()->mutable_ranks()->set_min(ranks);
  config.mutable_parallel()->mutable_ranks()->set_max(ranks);
  config.mutable_parallel()->set_cpus_per_rank(1);
  config.mutable_training()->set_max_steps(world_.Between(3, 60));
  config.mutable_checkpoint()->set_save_interval(world_.Between(2, 15));
  config.mutable_checkpoint()->set_keep_last(static_cast<int>(world_.Between(1, 3)));
  config.mutable_schedule()->set_max_restarts(
      plan_.coordinator_only ? 3 : static_cast<int>(world_.Between(2, 20)));
  config.mutable_schedule()->set_hang_kill_after(plan_.hang_kill_ms);
  config.mutable_schedule()->set_priority(static_cast<int>(world_.Between(0, 99)));
  if (!plan_.coordinator_only && world_.Chance(0.1)) {
    config.mutable_schedule()->set_time_limit(world_.Between(1'000, 20'000));
  }
  if (world_.Chance(0.1)) {
    config.mutable_schedule()->set_start_time(coordinator_.Now().wall_ms +
                                              world_.Between(1'000, 30'000));
  }
  return config;
}

void Users::Submit(int number) {
  const auto event = std::make_shared<state::event::JobSubmitted>();
  event->config = MakeConfig(number);
  event->hold = world_.Chance(0.05);
  if (!known_.empty() && world_.Chance(0.2)) {
    v1::DependencyRecord& after = event->after.emplace_back();
    after.set_job(
        known_[static_cast<size_t>(world_.Between(0, static_cast<int64_t>(known_.size()) - 1))]
            .value);
    after.set_kind(static_cast<v1::DependencyKind>(world_.Between(0, 2)));
  }
  event->request.identity = "user";
  event->request.request_id = event->config.name();
  event->request.digest = event->config.name();
  Call(
      [this, event] {
        // Each arrival gets a fresh id: only the request id ties repeats together.
        event->id = ids_.Next(1'750'000'000'000 + world_.now_ms());
        return state::Event(*event);
      },
      [this, name = event->config.name()](const state::Outcome& outcome) {
        if (outcome.status.ok()) {
          checkers_.OnSubmitAcknowledged(name, outcome.job);
          known_.push_back(outcome.job);
        }
      },
      200);
}

void Users::PlanSubmits() {
  for (int i = 0; i < plan_.jobs; ++i) {
    world_.After(i == 0 ? 0 : world_.Between(0, plan_.fault_ms / 2), [this, i] { Submit(i); });
  }
}

void Users::DoVerb() {
  if (known_.empty()) {
    return;
  }
  const JobId job =
      known_[static_cast<size_t>(world_.Between(0, static_cast<int64_t>(known_.size()) - 1))];
  const state::ClientRequest request{"user", Str("verb-", next_request_++), "", 0};
  const int64_t verb = world_.Between(0, 6);
  if (verb <= 2) {
    state::event::JobStopped stop{request, job, v1::STOP_VERB_PAUSE, std::nullopt, "user"};
    stop.verb = verb == 0   ? v1::STOP_VERB_PAUSE
                : verb == 1 ? v1::STOP_VERB_PREEMPT
                            : v1::STOP_VERB_CANCEL;
    if (verb == 2 && !world_.Chance(0.3)) {
      return;  // cancels end the fun too soon
    }
    if (world_.Chance(0.3)) {
      stop.grace_ms = world_.Between(0, 20'000);
    }
    Call([stop] { return state::Event(stop); },
         [this, stop](const state::Outcome& outcome) {
           if (outcome.status.ok() && stop.verb == v1::STOP_VERB_CANCEL) {
             checkers_.OnCancelAcknowledged(stop.job);
           }
         },
         3);
  } else if (verb <= 4) {
    checkers_.OnResumeAsked(job);
    Call(
        [request, job] {
          return state::Event(state::event::JobResumed{request, job, {}});
        },
        [](const state::Outcome&) {}, 3);
  } else if (verb == 5) {
    Call(
        [request, job] {
          return state::Event(state::event::JobHeld{request, job});
        },
        [](const state::Outcome&) {}, 3);
  } else {
    Call(
        [request, job] {
          return state::Event(state::event::JobReleased{request, job});
        },
        [](const state::Outcome&) {}, 3);
  }
}

void Users::DoAdmin(const std::vector<std::string>& workers) {
  const std::string& node =
      workers[static_cast<size_t>(world_.Between(0, static_cast<int64_t>(workers.size()) - 1))];
  const auto verb = static_cast<v1::NodeVerb>(world_.Between(0, 3));
  if (verb == v1::NODE_VERB_FORGET) {
    return;  // a promise by a person that all is dead, which nobody can give here
  }
  Call(
      [this, node, verb] {
        return state::Event(state::event::NodeAdministered{
            {"user", "", "", 0}, node, verb, "test", world_.Between(0, 10'000)});
      },
      [](const state::Outcome&) {}, 3);
}

void Users::ReopenAll(const std::vector<std::string>& workers) {
  for (const std::string& node : workers) {
    Call(
        [node] {
          return state::Event(state::event::NodeAdministered{
              {"user", "", "", 0}, node, v1::NODE_VERB_REOPEN, "calm", std::nullopt});
        },
        [](const state::Outcome&) {}, 50);
  }
}

}  // namespace heddle::simulation
