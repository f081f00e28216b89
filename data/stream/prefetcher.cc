#include "data/stream/prefetcher.h"

#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>
#include <utility>

#include "base/clock/clock.h"

namespace heddle::stream {

class Prefetcher::Impl {
 public:
  Impl(std::shared_ptr<const SequenceSource> source, const PrefetchOptions& options)
      : source_(std::move(source)), options_(options) {
    const int64_t micro_batches = options.global_batch_size / options.micro_batch_size;
    range_ = RankMicroBatches(micro_batches, options.rank, options.world);
    // A rank without micro-batches never calls Next.
    if (per_step() > 0) thread_ = std::thread([this] { Run(); });
  }

  ~Impl() {
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    changed_.notify_all();
    if (thread_.joinable()) thread_.join();
  }

  StatusOr<PackedBatch> Next(int64_t step, int64_t k) {
    const int64_t start_ns = clock_.NowSteady();
    std::unique_lock lock(mutex_);
    const int64_t wanted = (step - options_.first_step) * per_step() + k;
    if (k < 0 || k >= per_step() || wanted != consumed_) {
      return FailedPrecondition(Str("micro-batch ", k, " of step ", step,
                                    " is not the next: this rank has ", per_step(),
                                    " a step and has taken ", consumed_));
    }
    changed_.wait(lock, [this] { return !ready_.empty(); });
    wait_ms_ += static_cast<double>(clock_.NowSteady() - start_ns) * 1e-6;
    if (!ready_.front().ok()) return ready_.front().status();  // stays: nothing comes after it
    StatusOr<PackedBatch> batch = std::move(ready_.front());
    ready_.pop_front();
    ++consumed_;
    lock.unlock();
    changed_.notify_all();
    return batch;
  }

  PrefetchStats stats() const {
    const std::lock_guard lock(mutex_);
    PrefetchStats stats;
    stats.queue_depth = static_cast<int64_t>(ready_.size());
    stats.wait_ms = wait_ms_;
    return stats;
  }

 private:
  int64_t per_step() const { return range_.end - range_.begin; }

  void Run() {
    for (int64_t counter = 0;; ++counter) {
      {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [&] { return stopping_ || counter < consumed_ + options_.depth; });
        if (stopping_) return;
      }
      StatusOr<PackedBatch> batch = ReadMicroBatch(
          *source_, options_.first_step + counter / per_step(), options_.global_batch_size,
          options_.micro_batch_size, range_.begin + counter % per_step());
      const bool failed = !batch.ok();
      {
        const std::lock_guard lock(mutex_);
        ready_.push_back(std::move(batch));
      }
      changed_.notify_all();
      if (failed) return;
    }
  }

  const std::shared_ptr<const SequenceSource> source_;
  const PrefetchOptions options_;
  const SystemClock clock_;
  MicroBatchRange range_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<StatusOr<PackedBatch>> ready_;  // micro-batches consumed_, consumed_ + 1, ...
  int64_t consumed_ = 0;
  double wait_ms_ = 0;
  bool stopping_ = false;
  std::thread thread_;
};

Prefetcher::Prefetcher(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Prefetcher::~Prefetcher() = default;

StatusOr<std::unique_ptr<Prefetcher>> Prefetcher::Create(
    std::shared_ptr<const SequenceSource> source, const PrefetchOptions& options) {
  if (options.micro_batch_size < 1 || options.global_batch_size < 1 ||
      options.global_batch_size % options.micro_batch_size != 0) {
    return InvalidArgument(Str("global batch of ", options.global_batch_size,
                               ": must be a positive multiple of the micro-batch of ",
                               options.micro_batch_size));
  }
  if (options.world < 1 || options.rank < 0 || options.rank >= options.world) {
    return InvalidArgument(Str("rank ", options.rank, ": must be in [0, ", options.world, ")"));
  }
  if (options.first_step < 0 || options.depth < 1) {
    return InvalidArgument("prefetch: first step and depth must not be negative or zero");
  }
  return std::unique_ptr<Prefetcher>(
      new Prefetcher(std::make_unique<Impl>(std::move(source), options)));
}

StatusOr<PackedBatch> Prefetcher::Next(int64_t step, int64_t k) { return impl_->Next(step, k); }
PrefetchStats Prefetcher::stats() const { return impl_->stats(); }

}  // namespace heddle::stream
