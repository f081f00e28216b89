#include "data/pack/encode_pool.h"

#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>
#include <utility>

namespace heddle::pack {
namespace {

void EncodeAll(tokenizer::Encoder& encoder, uint32_t eos, EncodeBatch* batch) {
  tokenizer::EncodeOptions options;
  options.parse_special_tokens = false;  // so that eos stands at document ends only
  for (size_t i = 0; i < batch->texts.size(); ++i) {
    const Status status = encoder.Encode(batch->texts[i], options, &batch->tokens);
    if (!status.ok()) {
      batch->status = Annotate(status, batch->names[i]);
      return;
    }
    batch->tokens.push_back(eos);
    batch->ends.push_back(batch->tokens.size());
  }
}

}  // namespace

class EncodePool::Impl {
 public:
  Impl(const tokenizer::Tokenizer& tokenizer, int threads) : tokenizer_(tokenizer) {
    HEDDLE_CHECK(tokenizer.eos_id().has_value());
    for (int i = 0; i < threads; ++i) threads_.emplace_back([this] { Work(); });
  }

  ~Impl() {
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    work_ready_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  void Submit(std::unique_ptr<EncodeBatch> batch) {
    auto slot = std::make_shared<Slot>();  // shared: queue of work and queue of results hold it
    slot->batch = std::move(batch);
    {
      const std::lock_guard lock(mutex_);
      work_.push_back(slot);
      results_.push_back(slot);
    }
    work_ready_.notify_one();
  }

  size_t pending() const {
    const std::lock_guard lock(mutex_);
    return results_.size();
  }

  std::unique_ptr<EncodeBatch> Take() {
    std::unique_lock lock(mutex_);
    const std::shared_ptr<Slot> slot = results_.front();
    result_ready_.wait(lock, [&] { return slot->done; });
    results_.pop_front();
    return std::move(slot->batch);
  }

 private:
  struct Slot {
    std::unique_ptr<EncodeBatch> batch;
    bool done = false;
  };

  void Work() {
    tokenizer::Encoder encoder(tokenizer_);
    while (true) {
      std::shared_ptr<Slot> slot;
      {
        std::unique_lock lock(mutex_);
        work_ready_.wait(lock, [this] { return stopping_ || !work_.empty(); });
        if (stopping_) return;
        slot = work_.front();
        work_.pop_front();
      }
      EncodeAll(encoder, *tokenizer_.eos_id(), slot->batch.get());
      {
        const std::lock_guard lock(mutex_);
        slot->done = true;
      }
      result_ready_.notify_one();
    }
  }

  const tokenizer::Tokenizer& tokenizer_;
  mutable std::mutex mutex_;
  std::condition_variable work_ready_;
  std::condition_variable result_ready_;
  std::deque<std::shared_ptr<Slot>> work_;
  std::deque<std::shared_ptr<Slot>> results_;
  std::vector<std::thread> threads_;
  bool stopping_ = false;
};

EncodePool::EncodePool(const tokenizer::Tokenizer& tokenizer, int threads)
    : impl_(std::make_unique<Impl>(tokenizer, threads)) {}
EncodePool::~EncodePool() = default;
void EncodePool::Submit(std::unique_ptr<EncodeBatch> batch) { impl_->Submit(std::move(batch)); }
size_t EncodePool::pending() const { return impl_->pending(); }
std::unique_ptr<EncodeBatch> EncodePool::Take() { return impl_->Take(); }

}  // namespace heddle::pack
