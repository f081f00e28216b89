// Bug 41 of attention-and-moe.md section 15, accepted options without effect: every key of the
// model is turned, alone, in a small model where it must show. A key that none of the tables below
// names fails EveryKeyOfTheModelHasAnEffect by its name, so a new key cannot be forgotten.
#include <ATen/core/Tensor.h>
#include <google/protobuf/descriptor.h>
#include <google/protobuf/message.h>
#include <google/protobuf/text_format.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <map>
#include <set>
#include <span>
#include <sstream>
#include <string>
#include <vector>

#include "base/status/status.h"
#include "tests/model/config_effect_tables.h"
#include "tests/model/inference/inference_models.h"
#include "tests/model/tiny_model.h"
#include "tests/support/status_matchers.h"

namespace heddle::model {
namespace {

using google::protobuf::FieldDescriptor;
using google::protobuf::Message;
using google::protobuf::Reflection;
using heddle::v1::ModelConfig;
using model_test::BatchData;
using model_test::Built;
using model_test::EffectRow;

// ---- What can be seen of a model ----------------------------------------------------------------

// Name of a part -> its bytes.
using Seen = std::map<std::string, std::string>;

std::string Bytes(const void* data, size_t size) { return {static_cast<const char*>(data), size}; }
std::string Bytes(const at::Tensor& tensor) {
  const at::Tensor rows = tensor.contiguous();
  return Str(rows.numel(), ":") + Bytes(rows.const_data_ptr(), rows.nbytes());
}
std::string Bytes(const std::vector<double>& values) {
  return Bytes(values.data(), values.size() * sizeof(double));
}

void PrintTensors(const std::vector<TensorSpec>& tensors, std::ostream* shapes,
                  std::ostream* starts) {
  for (const TensorSpec& tensor : tensors) {
    *shapes << tensor.name << " u" << tensor.unit << " @" << tensor.offset;
    for (const int64_t size : tensor.shape) *shapes << " " << size;
    *shapes << "\n";
    *starts << tensor.name << " " << static_cast<int>(tensor.init) << " " << tensor.init_stddev
            << " " << tensor.init_value << "\n";
  }
}

void SeePlan(const ModelPlan& plan, Seen* seen) {
  std::ostringstream shapes;
  std::ostringstream starts;
  PrintTensors(plan.tensors, &shapes, &starts);
  PrintTensors(plan.buffers, &shapes, &starts);
  (*seen)["shapes"] = shapes.str();
  (*seen)["init"] = starts.str();
}

// A prompt longer than the windows, then tokens one by one: keys are evicted, windows completed.
void SeeDecoding(const ModelConfig& config, const Built& built, Seen* seen) {
  const BatchData tokens = model_test::RandomBatch({36}, config.vocab_size(), 5);
  const std::span<const int64_t> ids = tokens.ids;
  const auto decoder = inference_test::MakeDecoder(config, built);
  const inference::SequenceId sequence = decoder->Open();
  std::string out = Bytes(inference_test::FeedOne(decoder.get(), sequence, ids.first(24)));
  for (size_t t = 24; t < ids.size(); ++t) {
    out += Bytes(inference_test::FeedOne(decoder.get(), sequence, ids.subspan(t, 1)));
  }
  (*seen)["decoded"] = out;
}

// One step of training in each stage: losses, gradients, and the buffers after the update.
void SeeTraining(const Built& built, const BatchData& batch, Seen* seen) {
  for (const bool warmup : {true, false}) {
    built.store->ZeroGradients();
    for (double& statistic : built.model->statistics()) statistic = 0;
    const LossSum loss = *built.model->ForwardBackward(batch.view(), {.loss_scale = 1.0 / 60,
                                                                      .row_scale = 1.0 / 64,
                                                                      .step = warmup ? 3 : 4,
                                                                      .seed = 23,
                                                                      .indexer_warmup = warmup});
    (*seen)["loss"] += Bytes({loss.loss});
    (*seen)["indexer loss"] += Bytes({loss.layers.indexer});
    (*seen)["balance loss"] += Bytes({loss.layers.balance});
    (*seen)["router loss"] += Bytes({loss.layers.router_z});
    const auto elements = static_cast<size_t>(built.store->plan().flat_elements);
    (*seen)["gradients"] += Bytes(built.store->gradient_data(), elements * sizeof(double));
    built.model->UpdateBuffers(/*frozen=*/false);
    const std::span<const float> buffers = built.store->buffers();
    (*seen)["buffers"] += Bytes(buffers.data(), buffers.size_bytes());
  }
}

Seen Observe(const ModelConfig& config) {
  Seen seen;
  SeePlan(*PlanModel(config), &seen);
  const Built built = inference_test::BuildStrong(config, Precision::kFp64);
  const BatchData batch = model_test::RandomBatch({42, 0, 3, 19}, config.vocab_size(), 29);
  seen["logits"] = Bytes(*built.model->Logits(batch.view()));
  SeeDecoding(config, built, &seen);
  SeeTraining(built, batch, &seen);
  return seen;
}

// Of a base, which many rows share.
const Seen& ObserveBase(const ModelConfig& config) {
  static auto* bases = new std::map<std::string, Seen>;
  Seen& seen = (*bases)[config.DebugString()];
  if (seen.empty()) seen = Observe(config);
  return seen;
}

// Names of the parts that differ.
std::set<std::string> Differences(const Seen& a, const Seen& b) {
  std::set<std::string> parts;
  for (const auto& [part, bytes] : a) {
    if (b.at(part) != bytes) parts.insert(part);
  }
  return parts;
}

// ---- Keys ---------------------------------------------------------------------------------------

// Calls visit(path, field) for every key below, "attention.nsa.topk"; a list is one key.
void ForKeys(const google::protobuf::Descriptor& type, const std::string& prefix,
             const std::function<void(const std::string&, const FieldDescriptor&)>& visit) {
  for (int i = 0; i < type.field_count(); ++i) {
    const FieldDescriptor& field = *type.field(i);
    if (field.cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE && !field.is_repeated()) {
      ForKeys(*field.message_type(), prefix + field.name() + ".", visit);
    } else {
      visit(prefix + field.name(), field);
    }
  }
}

std::map<std::string, const FieldDescriptor*> KeysOfModel() {
  std::map<std::string, const FieldDescriptor*> keys;
  ForKeys(*ModelConfig::descriptor(), "",
          [&](const std::string& path, const FieldDescriptor& field) { keys[path] = &field; });
  return keys;
}

// The group that holds the key, made if it is absent.
Message* GroupOf(const std::string& path, Message* message) {
  const size_t dot = path.find('.');
  if (dot == std::string::npos) return message;
  const FieldDescriptor* field = message->GetDescriptor()->FindFieldByName(path.substr(0, dot));
  return GroupOf(path.substr(dot + 1), message->GetReflection()->MutableMessage(message, field));
}
std::string LastWord(const std::string& path) { return path.substr(path.rfind('.') + 1); }

// Empties the key, then reads "value", or "value value" for a list.
void SetKey(const std::string& path, const std::string& values, ModelConfig* config) {
  Message* group = GroupOf(path, config);
  const FieldDescriptor* field = group->GetDescriptor()->FindFieldByName(LastWord(path));
  ASSERT_NE(field, nullptr) << path;
  group->GetReflection()->ClearField(group, field);
  std::istringstream words(values);
  for (std::string word; words >> word;) {
    ASSERT_TRUE(
        google::protobuf::TextFormat::MergeFromString(Str(field->name(), ": ", word), group))
        << path << " = " << word;
  }
}

// Its value as SetKey reads it; where it is absent, the default.
std::string ValueOf(const std::string& path, ModelConfig config) {
  Message* group = GroupOf(path, &config);
  const Reflection& reflection = *group->GetReflection();
  const FieldDescriptor& field = *group->GetDescriptor()->FindFieldByName(LastWord(path));
  const int count = field.is_repeated() ? reflection.FieldSize(*group, &field) : 1;
  std::string values;
  for (int i = 0; i < count; ++i) {
    std::string word;
    google::protobuf::TextFormat::PrintFieldValueToString(*group, &field,
                                                          field.is_repeated() ? i : -1, &word);
    values += (values.empty() ? "" : " ") + word;
  }
  return values;
}

ModelConfig BaseOf(const EffectRow& row) {
  ModelConfig config = inference_test::ConfigOf(row.base);
  EXPECT_TRUE(google::protobuf::TextFormat::MergeFromString(row.more, &config)) << row.more;
  return config;
}

// ---- Tests --------------------------------------------------------------------------------------

// Every value gives a model of its own, and the base's value gives the base again.
void ExpectEffect(const EffectRow& row) {
  SCOPED_TRACE(row.key);
  const ModelConfig base = BaseOf(row);
  ASSERT_OK(PlanModel(base));
  std::map<std::string, Seen> by_value = {{ValueOf(row.key, base), ObserveBase(base)}};
  ModelConfig turned = base;
  for (const std::string& value : row.values) {
    SetKey(row.key, value, &turned);
    ASSERT_OK(PlanModel(turned)) << value;
    const Seen seen = Observe(turned);
    for (const auto& [other, of_other] : by_value) {
      const std::set<std::string> parts = Differences(of_other, seen);
      EXPECT_EQ(parts.count(row.shows), 1u)
          << value << " against " << other << " differs in " << testing::PrintToString(parts);
    }
    by_value[value] = seen;
  }
  EXPECT_EQ(by_value.size(), row.values.size() + 1) << "a value stands twice";
  const std::string again = ValueOf(row.key, base);
  SetKey(row.key, again, &turned);
  EXPECT_EQ(Differences(by_value.at(again), Observe(turned)), std::set<std::string>{});
}

// Choices: every word of an enum is turned to, so that none is read as another.
void ExpectEveryChoice(const EffectRow& row, const FieldDescriptor& field) {
  if (field.cpp_type() != FieldDescriptor::CPPTYPE_ENUM || field.is_repeated()) return;
  std::set<std::string> words(row.values.begin(), row.values.end());
  words.insert(ValueOf(row.key, BaseOf(row)));
  for (int i = 0; i < field.enum_type()->value_count(); ++i) {
    const std::string& word = field.enum_type()->value(i)->name();
    EXPECT_EQ(words.count(word), 1u) << row.key << ": " << word << " is never turned to";
  }
}

TEST(ConfigEffect, EveryKeyOfTheModelHasAnEffect) {
  const std::map<std::string, const FieldDescriptor*> keys = KeysOfModel();
  std::set<std::string> named;
  for (const EffectRow& row : model_test::EffectRows()) {
    ASSERT_EQ(keys.count(row.key), 1u) << row.key << " is no key";
    named.insert(row.key);
    ExpectEveryChoice(row, *keys.at(row.key));
    ExpectEffect(row);
  }
  for (const auto& row : model_test::RowsOutsideTheModel()) named.insert(row.key);
  for (const auto& row : model_test::RefusedRows()) named.insert(row.key);
  for (const auto& [key, field] : keys) {
    EXPECT_EQ(named.count(key), 1u)
        << "model." << key << " stands in no table of config_effect_tables.h: nothing shows that "
        << "it has an effect";
  }
}

// No layer computes these: a configuration that turns them is refused, by their name.
TEST(ConfigEffect, KeysThatNoLayerComputesAreRefused) {
  for (const auto& row : model_test::RefusedRows()) {
    ModelConfig config = inference_test::ConfigOf("dense");
    ASSERT_OK(PlanModel(config));
    SetKey(row.key, row.value, &config);
    const StatusOr<ModelPlan> plan = PlanModel(config);
    ASSERT_FALSE(plan.ok()) << row.key;
    EXPECT_NE(Str(plan.status()).find(Str("model.", row.reason)), std::string::npos)
        << plan.status();
  }
}

// What others than the model read: the test that shows the effect is there under its name, and
// reads like one that sets the key.
TEST(ConfigEffect, KeysOfTheTrainerHaveTestsOfTheirOwn) {
  const char* source = std::getenv("HEDDLE_SOURCE_DIR");
  ASSERT_NE(source, nullptr);
  for (const auto& row : model_test::RowsOutsideTheModel()) {
    std::ifstream file(Str(source, "/", row.file));
    ASSERT_TRUE(file.good()) << row.file;
    std::ostringstream text;
    text << file.rdbuf();
    EXPECT_NE(text.str().find(Str("TEST(", row.test, ")")), std::string::npos)
        << row.key << ": " << row.file << " has no test " << row.test;
    EXPECT_NE(text.str().find(Str("set_", LastWord(row.key), "(")), std::string::npos)
        << row.key << ": nothing in " << row.file << " sets it";
  }
}

}  // namespace
}  // namespace heddle::model
