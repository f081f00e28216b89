#include "model/hf/model_dir.h"

#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>

#include "base/rng/rng.h"
#include "model/hf/config_json.h"
#include "model/hf/safetensors.h"
#include "tests/model/tiny_model.h"

namespace heddle::hf {
namespace {

namespace fs = std::filesystem;
using model::Precision;
using model_test::Build;
using model_test::Built;
using model_test::Kind;
using model_test::TinyConfig;
using nlohmann::json;

class TempDir {
 public:
  TempDir() {
    std::string name = fs::temp_directory_path() / "heddle-hf-XXXXXX";
    path_ = mkdtemp(name.data());
  }
  ~TempDir() { fs::remove_all(path_); }
  std::string operator/(const std::string& name) const { return path_ + "/" + name; }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

std::string ReadAll(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

std::string File(const std::string& header, const std::string& data) {
  std::string out(8, '\0');
  for (size_t i = 0; i < 8; ++i) out[i] = static_cast<char>((header.size() >> (8 * i)) & 0xff);
  return out + header + data;
}

Status Parse(const std::string& file) { return ParseHeader(file, file.size()).status(); }

TEST(Safetensors, ReadsWhatIsLegal) {
  const std::string header =
      R"({"b":{"dtype":"F32","shape":[],"data_offsets":[3,7]},"__metadata__":{"k":"v"},)"
      R"("a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},)"
      R"("e":{"dtype":"BF16","shape":[0,9],"data_offsets":[7,7]}}   )";
  const std::string file = File(header, "abcdefg");
  const StatusOr<Header> parsed = ParseHeader(file, file.size());
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  EXPECT_EQ(parsed->tensors.size(), 3u);
  EXPECT_EQ(parsed->tensors.at("b").Elements(), 1);
  EXPECT_EQ(parsed->tensors.at("e").Elements(), 0);
  EXPECT_EQ(parsed->metadata.at("k"), "v");
}

TEST(Safetensors, RefusesEveryKindOfDamage) {
  const auto one = [](const std::string& body) { return File("{" + body + "}", "abcd"); };
  const std::string good = R"("a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]})";
  ASSERT_TRUE(Parse(one(good)).ok());
  const std::vector<std::string> bad = {
      "",
      "abc",
      File("", ""),
      File("[]", ""),
      File(" {}", ""),
      File("{", ""),
      File("{}", "x"),
      one(good).substr(0, 20),
      one(good + "," + good),  // repeated key
      one(R"("a":{"dtype":"U8","dtype":"U8","shape":[4],"data_offsets":[0,4]})"),
      one(R"("a":{"dtype":"F3","shape":[4],"data_offsets":[0,4]})"),  // dtype
      one(R"("a":{"dtype":"U8","shape":[-4],"data_offsets":[0,4]})"),
      one(R"("a":{"dtype":"U8","shape":[4.0],"data_offsets":[0,4]})"),
      one(R"("a":{"dtype":"U8","shape":[3],"data_offsets":[0,4]})"),  // size
      one(R"("a":{"dtype":"U8","shape":[4],"data_offsets":[4,0]})"),
      one(R"("a":{"dtype":"U8","shape":[4],"data_offsets":[0,5]})"),
      one(R"("a":{"dtype":"U8","shape":[3],"data_offsets":[1,4]})"),  // hole
      one(R"("a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]})"),  // short
      one(R"("a":{"dtype":"U8","shape":[4],"data_offsets":[0,4],"x":1})"),
      one(R"("a":{"dtype":"U64","shape":[4294967296,4294967296],"data_offsets":[0,4]})"),
      one(good + R"(,"b":{"dtype":"U8","shape":[4],"data_offsets":[0,4]})"),  // overlap
      one(good + R"(,"__metadata__":{"k":1})"),
      std::string("\xff\xff\xff\xff\xff\xff\xff\xff{}", 10)};
  for (const std::string& file : bad) EXPECT_FALSE(Parse(file).ok()) << file;
}

// I1: mutated headers never crash, and what is accepted tiles the buffer.
TEST(Safetensors, SurvivesMutations) {
  const std::string header =
      R"({"a":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},"b":{"dtype":"BF16","shape":[2],)"
      R"("data_offsets":[8,12]}})";
  const std::string file = File(header, std::string(12, 'x'));
  const Rng rng(1, "test.mutation");
  for (uint64_t round = 0; round < 3000; ++round) {
    std::string mutated = file;
    for (uint64_t k = 0; k < 1 + round % 3; ++k) {
      const uint64_t draw = rng.At(round * 8 + k);
      mutated[(draw >> 8) % mutated.size()] = static_cast<char>(draw & 0xff);
    }
    if (round % 5 == 0) mutated.resize(rng.At(round * 8 + 7) % mutated.size());
    const StatusOr<Header> parsed = ParseHeader(mutated, mutated.size());
    if (!parsed.ok()) continue;
    uint64_t bytes = 0;
    for (const auto& [name, entry] : parsed->tensors) bytes += entry.end - entry.begin;
    ASSERT_EQ(parsed->buffer_offset + bytes, mutated.size()) << "round " << round;
  }
}

TEST(Safetensors, WritesTheReferenceForm) {
  TempDir dir;
  const float values[3] = {1, 2, 3};
  const int64_t ids[2] = {7, 8};
  ASSERT_TRUE(WriteSafetensors(dir / "x.safetensors", {{"b", DType::kF32, {3}, values},
                                                       {"a", DType::kF32, {}, values},
                                                       {"z", DType::kI64, {2, 1}, ids}})
                  .ok());
  const std::string file = ReadAll(dir / "x.safetensors");
  const std::string expected =
      R"({"__metadata__":{"format":"pt"},"z":{"dtype":"I64","shape":[2,1],"data_offsets":[0,16]},)"
      R"("a":{"dtype":"F32","shape":[],"data_offsets":[16,20]},)"
      R"("b":{"dtype":"F32","shape":[3],"data_offsets":[20,32]}})";
  EXPECT_EQ(file.substr(8, expected.size()), expected);
  EXPECT_EQ(static_cast<unsigned char>(file[0]) % 8, 0);
  EXPECT_FALSE(fs::exists(dir / "x.safetensors.tmp"));
  const auto read = *SafetensorsFile::Open(dir / "x.safetensors");
  std::vector<float> b(3);
  ASSERT_TRUE(read->ReadFloats("b", b).ok());
  EXPECT_EQ(b, (std::vector<float>{1, 2, 3}));
  EXPECT_EQ(*read->ReadIntegers("z"), (std::vector<int64_t>{7, 8}));
  EXPECT_FALSE(WriteSafetensors(dir / "y",
                                {{"b", DType::kF32, {3}, values}, {"b", DType::kF32, {3}, values}})
                   .ok());
  EXPECT_EQ(SafetensorsFile::Open(dir / "none").status().code(), StatusCode::kNotFound);
}

TEST(Safetensors, WidensHalfPrecision) {
  TempDir dir;
  const uint16_t half[6] = {0x3c00, 0xc000, 0x0001, 0x7bff, 0x7c00, 0x8000};
  const uint16_t brain[2] = {0x3f80, 0xc040};
  ASSERT_TRUE(
      WriteSafetensors(dir / "h", {{"h", DType::kF16, {6}, half}, {"b", DType::kBF16, {2}, brain}})
          .ok());
  const auto file = *SafetensorsFile::Open(dir / "h");
  std::vector<float> h(6), b(2);
  ASSERT_TRUE(file->ReadFloats("h", h).ok());
  ASSERT_TRUE(file->ReadFloats("b", b).ok());
  EXPECT_EQ(h, (std::vector<float>{1.0f, -2.0f, std::ldexp(1.0f, -24), 65504.0f,
                                   std::numeric_limits<float>::infinity(), -0.0f}));
  EXPECT_EQ(b, (std::vector<float>{1.0f, -3.0f}));
}

std::vector<NamedWeight> WeightsOf(model::ParameterStore* store) {
  std::vector<NamedWeight> weights;
  for (const model::TensorSpec& tensor : store->plan().tensors) {
    weights.push_back({tensor.name, tensor.shape, store->master(tensor)});
  }
  return weights;
}

TEST(ModelDir, RoundTripsEveryKindAndSplit) {
  for (const Kind kind : {Kind::kDense, Kind::kSwa, Kind::kHybrid}) {
    for (const int64_t shard_bytes : {int64_t{5'000'000'000}, int64_t{4000}}) {
      TempDir dir;
      const heddle::v1::ModelConfig config = TinyConfig(kind, kind != Kind::kSwa);
      Built built = Build(config, Precision::kFp32);
      std::ofstream(dir / "tok.json") << "{\"tokenizer\":1}";
      ExportOptions options;
      options.tokenizer_path = dir / "tok.json";
      options.shard_bytes_max = shard_bytes;
      ASSERT_TRUE(WriteModelDir(dir / "m", config, WeightsOf(built.store.get()), options).ok());
      EXPECT_EQ(fs::exists(dir / "m/model.safetensors.index.json"), shard_bytes == 4000);
      EXPECT_EQ(ReadAll(dir / "m/tokenizer.json"), "{\"tokenizer\":1}");
      const heddle::v1::ModelConfig back = *ReadModelConfig(dir / "m");
      auto store = *model::ParameterStore::Create(*model::PlanModel(back), Precision::kFp32);
      const Status read = ReadWeights(dir / "m", store.get());
      ASSERT_TRUE(read.ok()) << read;
      ASSERT_TRUE(std::equal(store->master().begin(), store->master().end(),
                             built.store->master().begin()));
      for (int layer = 0; layer < 3; ++layer) {
        EXPECT_EQ(model::LayerKind(back, layer), model::LayerKind(config, layer));
      }
      EXPECT_EQ(back.attention().swa().sink_size(), config.attention().swa().sink_size());
    }
  }
}

TEST(ModelDir, ListsEveryTensorThatDiffers) {
  TempDir dir;
  const heddle::v1::ModelConfig config = TinyConfig(Kind::kDense, true);
  Built built = Build(config, Precision::kFp32);
  ASSERT_TRUE(WriteModelDir(dir / "m", config, WeightsOf(built.store.get()), {}).ok());
  heddle::v1::ModelConfig other = config;
  other.set_n_layers(4);
  other.set_d_ffn(30);
  auto store = *model::ParameterStore::Create(*model::PlanModel(other), Precision::kFp32);
  const std::string message = Message(ReadWeights(dir / "m", store.get()));
  EXPECT_NE(message.find("missing model.layers.3.mlp.up_proj.weight"), std::string::npos);
  EXPECT_NE(message.find("model.layers.0.mlp.up_proj.weight is [28,20], not [30,20]"),
            std::string::npos);
  EXPECT_EQ(ReadModelConfig(dir / "none").status().code(), StatusCode::kNotFound);
}

TEST(ModelDir, RefusesValuesThatAreNotFinite) {
  TempDir dir;
  const heddle::v1::ModelConfig config = TinyConfig(Kind::kDense, true);
  Built built = Build(config, Precision::kFp32);
  built.store->master(*built.store->plan().Find("model.norm.weight"))[3] = std::nanf("");
  const Status status = WriteModelDir(dir / "m", config, WeightsOf(built.store.get()), {});
  EXPECT_NE(Message(status).find("model.norm.weight"), std::string::npos);
  EXPECT_FALSE(fs::exists(dir / "m/config.json"));
}

TEST(ConfigJson, NamesTheArchitectureThatComputesTheSame) {
  heddle::v1::ModelConfig dense = TinyConfig(Kind::kDense, true);
  const json llama = json::parse(WriteConfigJson(dense));
  EXPECT_EQ(llama["model_type"], "llama");
  EXPECT_EQ(llama["architectures"][0], "LlamaForCausalLM");
  EXPECT_EQ(llama["num_key_value_heads"], 2);
  EXPECT_EQ(llama["head_dim"], 6);
  heddle::v1::ModelConfig swa = TinyConfig(Kind::kSwa, true);
  EXPECT_EQ(json::parse(WriteConfigJson(swa))["model_type"], "heddle");
  swa.mutable_attention()->mutable_swa()->set_sink_size(0);
  const json mistral = json::parse(WriteConfigJson(swa));
  EXPECT_EQ(mistral["model_type"], "mistral");
  EXPECT_EQ(mistral["sliding_window"], 5);
  EXPECT_EQ(json::parse(WriteConfigJson(TinyConfig(Kind::kHybrid, true)))["model_type"], "heddle");
  dense.mutable_rope()->set_layout(heddle::v1::RopeConfig::LAYOUT_INTERLEAVED);
  EXPECT_EQ(json::parse(WriteConfigJson(dense))["model_type"], "heddle");
}

TEST(ConfigJson, ReadsOldAndNewRopeKeysOfTransformers) {
  const heddle::v1::ModelConfig old = *ReadConfigJson(
      R"({"model_type":"llama","hidden_size":64,"num_attention_heads":4,"vocab_size":10,
          "num_hidden_layers":2,"intermediate_size":96,"rope_theta":500000.0,
          "rope_scaling":{"type":"llama3","factor":8.0,"low_freq_factor":1.0,
          "high_freq_factor":4.0,"original_max_position_embeddings":8192}})");
  EXPECT_EQ(old.rope().theta(), 500000.0);
  EXPECT_EQ(old.rope().scaling().type(), heddle::v1::RopeScalingConfig::TYPE_LLAMA3);
  EXPECT_EQ(old.n_kv_heads(), 4);
  EXPECT_EQ(old.head_dim(), 16);
  const heddle::v1::ModelConfig fresh = *ReadConfigJson(
      R"({"model_type":"mistral","hidden_size":64,"num_attention_heads":4,"vocab_size":10,
          "num_hidden_layers":2,"intermediate_size":96,"sliding_window":7,
          "rope_parameters":{"rope_type":"default","rope_theta":1e6}})");
  EXPECT_EQ(fresh.rope().theta(), 1e6);
  EXPECT_EQ(fresh.attention().swa().window(), 7);
  EXPECT_EQ(fresh.attention().swa().sink_size(), 0);
}

TEST(ConfigJson, RefusesWhatItDoesNotCompute) {
  for (const char* text :
       {"[]", "{", R"({"model_type":"gpt2"})", R"({"model_type":"llama","attention_bias":true})",
        R"({"model_type":"llama","hidden_act":"gelu"})",
        R"({"model_type":"llama","rope_scaling":{"rope_type":"dynamic","factor":2}})",
        R"({"model_type":"llama","hidden_size":"64"})", R"({"heddle":{"d_modell":3}})",
        R"({"heddle":{"ffn":"relu"}})", R"({"heddle":{"d_model":4294967296}})"}) {
    EXPECT_EQ(ReadConfigJson(text).status().code(), StatusCode::kInvalidArgument) << text;
  }
}

}  // namespace
}  // namespace heddle::hf
