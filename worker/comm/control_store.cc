#include "worker/comm/control_store.h"

#include <c10/util/Exception.h>

#include <utility>

#include "heddle/v1/control.pb.h"

namespace heddle::comm {

namespace {

using heddle::v1::RendezvousReply;
using heddle::v1::RendezvousRequest;

std::string ToBytes(const std::vector<uint8_t>& value) {
  return std::string(value.begin(), value.end());
}

std::vector<uint8_t> FromBytes(const std::string& value) {
  return std::vector<uint8_t>(value.begin(), value.end());
}

}  // namespace

ControlStore::ControlStore(RendezvousCall call, std::string key_prefix,
                           std::chrono::milliseconds timeout)
    : c10d::Store(timeout), shared_(std::make_shared<Shared>()) {
  shared_->call = std::move(call);
  shared_->prefix = std::move(key_prefix);
}

ControlStore::ControlStore(std::shared_ptr<Shared> shared, std::chrono::milliseconds timeout)
    : c10d::Store(timeout), shared_(std::move(shared)) {}

c10::intrusive_ptr<c10d::Store> ControlStore::clone() {
  return c10::make_intrusive<ControlStore>(shared_, timeout_);
}

void ControlStore::AddKey(const std::string& key, RendezvousRequest* request) const {
  request->add_keys(shared_->prefix + key);
}

RendezvousReply ControlStore::Ask(RendezvousRequest* request) {
  request->set_n(shared_->next.fetch_add(1));
  if (!request->has_timeout_ms()) {
    request->set_timeout_ms(timeout_.count());
  }
  const StatusOr<RendezvousReply> reply = shared_->call(*request);
  const std::string what = request->keys_size() > 0 ? request->keys(0) : "the store";
  if (!reply.ok()) {
    C10_THROW_ERROR(DistStoreError, Str("rendezvous of ", what, ": ", Message(reply.status())));
  }
  if (reply->code() != 0) {
    C10_THROW_ERROR(DistStoreError, Str("rendezvous of ", what, ": ", reply->message()));
  }
  return *reply;
}

void ControlStore::set(const std::string& key, const std::vector<uint8_t>& value) {
  multiSet({key}, {value});
}

std::vector<uint8_t> ControlStore::get(const std::string& key) { return multiGet({key}).front(); }

std::vector<uint8_t> ControlStore::compareSet(const std::string& key,
                                              const std::vector<uint8_t>& expected,
                                              const std::vector<uint8_t>& desired) {
  RendezvousRequest request;
  request.set_verb(heddle::v1::RENDEZVOUS_VERB_COMPARE_SET);
  AddKey(key, &request);
  request.add_values(ToBytes(expected));
  request.add_values(ToBytes(desired));
  const RendezvousReply reply = Ask(&request);
  return reply.values_size() > 0 ? FromBytes(reply.values(0)) : std::vector<uint8_t>();
}

int64_t ControlStore::add(const std::string& key, int64_t value) {
  RendezvousRequest request;
  request.set_verb(heddle::v1::RENDEZVOUS_VERB_ADD);
  AddKey(key, &request);
  request.set_amount(value);
  return Ask(&request).number();
}

bool ControlStore::deleteKey(const std::string& key) {
  RendezvousRequest request;
  request.set_verb(heddle::v1::RENDEZVOUS_VERB_DELETE);
  AddKey(key, &request);
  return Ask(&request).number() != 0;
}

bool ControlStore::check(const std::vector<std::string>& keys) {
  RendezvousRequest request;
  request.set_verb(heddle::v1::RENDEZVOUS_VERB_CHECK);
  for (const std::string& key : keys) {
    AddKey(key, &request);
  }
  return Ask(&request).number() != 0;
}

int64_t ControlStore::getNumKeys() {
  RendezvousRequest request;
  request.set_verb(heddle::v1::RENDEZVOUS_VERB_COUNT);
  return Ask(&request).number();
}

void ControlStore::wait(const std::vector<std::string>& keys) { wait(keys, timeout_); }

void ControlStore::wait(const std::vector<std::string>& keys,
                        const std::chrono::milliseconds& timeout) {
  RendezvousRequest request;
  request.set_verb(heddle::v1::RENDEZVOUS_VERB_WAIT);
  for (const std::string& key : keys) {
    AddKey(key, &request);
  }
  request.set_timeout_ms(timeout.count());
  Ask(&request);
}

void ControlStore::append(const std::string& key, const std::vector<uint8_t>& value) {
  RendezvousRequest request;
  request.set_verb(heddle::v1::RENDEZVOUS_VERB_APPEND);
  AddKey(key, &request);
  request.add_values(ToBytes(value));
  Ask(&request);
}

std::vector<std::vector<uint8_t>> ControlStore::multiGet(const std::vector<std::string>& keys) {
  RendezvousRequest request;
  request.set_verb(heddle::v1::RENDEZVOUS_VERB_GET);
  for (const std::string& key : keys) {
    AddKey(key, &request);
  }
  const RendezvousReply reply = Ask(&request);
  if (reply.values_size() != static_cast<int>(keys.size())) {
    C10_THROW_ERROR(DistStoreError,
                    Str("rendezvous: ", reply.values_size(), " values for ", keys.size(), " keys"));
  }
  std::vector<std::vector<uint8_t>> values;
  for (const std::string& value : reply.values()) {
    values.push_back(FromBytes(value));
  }
  return values;
}

void ControlStore::multiSet(const std::vector<std::string>& keys,
                            const std::vector<std::vector<uint8_t>>& values) {
  RendezvousRequest request;
  request.set_verb(heddle::v1::RENDEZVOUS_VERB_SET);
  for (size_t i = 0; i < keys.size(); ++i) {
    AddKey(keys[i], &request);
    request.add_values(ToBytes(values[i]));
  }
  Ask(&request);
}

}  // namespace heddle::comm
