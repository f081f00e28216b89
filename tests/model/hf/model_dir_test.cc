#include "model/hf/model_dir.h"

#include <gtest/gtest.h>

#include <sys/stat.h>

#include <chrono>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>

#include "base/rng/rng.h"
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

// Odd small sizes of one kind.
heddle::v1::ModelConfig OfKind(heddle::v1::AttentionKind kind) {
  heddle::v1::ModelConfig config = TinyConfig(Kind::kDense, true);
  heddle::v1::AttentionConfig* attention = config.mutable_attention();
  attention->set_kind(kind);
  attention->mutable_nsa()->set_kernel_size(4);
  attention->mutable_nsa()->set_kernel_stride(2);
  attention->mutable_nsa()->set_block_size(8);
  attention->mutable_dsa()->set_d_indexer(8);
  attention->mutable_gsa()->set_d_indexer(8);
  attention->mutable_mla()->set_kv_lora_rank(7);
  attention->mutable_mla()->set_qk_nope_head_dim(5);
  attention->mutable_mla()->set_qk_rope_head_dim(4);
  attention->mutable_mla()->set_v_head_dim(3);
  return config;
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
      one(good + R"(,"__metadata__":{"k":"a","k":"b"})"),
      one(good + R"(,"__metadata__":{},"__metadata__":{})"),
      one(R"("a":{"dtype":"U8","shape":[4],"data_offsets":[-1,3]})"),
      one(R"("a":{"dtype":"U8","shape":[4],"data_offsets":[0.0,4.0]})"),
      one(R"("a":{"dtype":"U8","shape":[4],"data_offsets":[0,18446744073709551616]})"),
      one(R"("a":{"dtype":"U8","shape":[4],"data_offsets":[18446744073709551612,18446744073709551615]})"),
      one(R"("a":{"dtype":"F4","shape":[8],"data_offsets":[0,4]})"),
      one(R"("a":{"dtype":1,"shape":[4],"data_offsets":[0,4]})"),
      one(R"("a":{"dtype":"U8","shape":{"0":4},"data_offsets":[0,4]})"),
      one(R"("a":{"dtype":"U8","shape":[[4]],"data_offsets":[0,4]})"),
      one(R"("a":{"dtype":"U8","shape":[9223372036854775808,0],"data_offsets":[0,4]})"),
      one(R"("a":[1],)" + good),
      one("\"\xff\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]}"),
      one(good) + "x",
      File("{" + good + "}garbage", "abcd"),
      std::string("\xff\xff\xff\xff\xff\xff\xff\xff{}", 10)};
  for (const std::string& file : bad) EXPECT_FALSE(Parse(file).ok()) << file;
}

// A header of brackets is refused before a parser sees it: no time, no memory.
TEST(Safetensors, RefusesDeepNestingWithoutParsingIt) {
  std::string text = "{\"a\":" + std::string(50'000'000, '[');
  const std::string file = File(text, "");
  const auto start = std::chrono::steady_clock::now();
  const Status status = Parse(file);
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  EXPECT_NE(Message(status).find("nested more than 3 deep"), std::string::npos) << status;
  EXPECT_LT(seconds, 2.0);
  // The same brackets inside a string are text.
  EXPECT_TRUE(Parse(File(R"({"__metadata__":{"[[[[{{{{":"\"[[[[["}})", "")).ok());
}

TEST(Safetensors, OpensRegularFilesOnly) {
  TempDir dir;
  ASSERT_EQ(mkfifo((dir / "fifo").c_str(), 0600), 0);
  EXPECT_EQ(SafetensorsFile::Open(dir / "fifo").status().code(), StatusCode::kInvalidArgument);
  EXPECT_FALSE(SafetensorsFile::Open(dir.path()).ok());
  EXPECT_FALSE(SafetensorsFile::Open("/dev/zero").ok());
  std::ofstream(dir / "empty");
  EXPECT_EQ(SafetensorsFile::Open(dir / "empty").status().code(), StatusCode::kInvalidArgument);
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

// Every kind of tensor and buffer that a plan can have, in one file and in many.
TEST(ModelDir, RoundTripsTensorsAndBuffersOfEveryKind) {
  std::vector<heddle::v1::ModelConfig> configs;
  for (const auto kind : {heddle::v1::ATTENTION_KIND_NSA, heddle::v1::ATTENTION_KIND_DSA,
                          heddle::v1::ATTENTION_KIND_GSA, heddle::v1::ATTENTION_KIND_MLA}) {
    configs.push_back(OfKind(kind));
  }
  configs.push_back(OfKind(heddle::v1::ATTENTION_KIND_MLA));
  configs.back().mutable_attention()->set_kind(heddle::v1::ATTENTION_KIND_DSA);
  configs.back().mutable_attention()->mutable_dsa()->set_core(heddle::v1::DsaConfig::CORE_MLA);
  configs.back().mutable_attention()->mutable_mla()->set_q_lora_rank(9);
  configs[0].set_norm(heddle::v1::ModelConfig::NORM_DYT);
  configs[1].set_ffn(heddle::v1::ModelConfig::FFN_GELU);
  for (heddle::v1::ModelConfig& config : configs) {
    config.mutable_moe()->set_n_experts(3);
    config.mutable_moe()->set_n_shared(1);
    config.mutable_moe()->set_d_expert(5);
    for (const int64_t shard_bytes : {int64_t{5'000'000'000}, int64_t{3000}}) {
      TempDir dir;
      auto store = *model::ParameterStore::Create(*model::PlanModel(config), Precision::kFp32);
      model::InitParameters(5, store.get());
      for (size_t i = 0; i < store->buffers().size(); ++i) {
        store->buffers()[i] = 0.25f * static_cast<float>(i + 1);
      }
      ExportOptions options;
      options.shard_bytes_max = shard_bytes;
      const Status written = WriteModelDir(dir / "m", config, WeightsOf(store.get()), options);
      ASSERT_TRUE(written.ok()) << written;
      const StatusOr<heddle::v1::ModelConfig> back = ReadModelConfig(dir / "m");
      ASSERT_TRUE(back.ok()) << back.status();
      auto read = *model::ParameterStore::Create(*model::PlanModel(*back), Precision::kFp32);
      const Status status = ReadWeights(dir / "m", read.get());
      ASSERT_TRUE(status.ok()) << status;
      EXPECT_TRUE(
          std::equal(read->master().begin(), read->master().end(), store->master().begin()));
      for (const model::TensorSpec& buffer : store->plan().buffers) {
        const std::span<float> values = store->buffer(buffer);
        EXPECT_TRUE(std::equal(values.begin(), values.end(), read->buffer(buffer).begin()))
            << buffer.name;
      }
    }
  }
}

// F15: Mixtral's own names, both ways; a selection bias that does something is not Mixtral's.
TEST(ModelDir, WritesMixtralUnderItsOwnNames) {
  TempDir dir;
  heddle::v1::ModelConfig config = TinyConfig(Kind::kDense, true);
  config.mutable_moe()->set_n_experts(2);
  config.mutable_moe()->set_d_expert(5);
  auto store = *model::ParameterStore::Create(*model::PlanModel(config), Precision::kFp32);
  model::InitParameters(5, store.get());
  ASSERT_TRUE(WriteModelDir(dir / "m", config, WeightsOf(store.get()), {}).ok());
  EXPECT_EQ(json::parse(ReadAll(dir / "m/config.json"))["model_type"], "mixtral");
  const auto file = *SafetensorsFile::Open(dir / "m/model.safetensors");
  const auto& tensors = file->header().tensors;
  EXPECT_EQ(tensors.at("model.layers.1.block_sparse_moe.gate.weight").shape,
            (std::vector<int64_t>{2, 20}));
  EXPECT_EQ(tensors.at("model.layers.1.block_sparse_moe.experts.1.w2.weight").shape,
            (std::vector<int64_t>{20, 5}));
  for (const auto& [name, entry] : tensors) {
    EXPECT_EQ(name.find(".mlp."), std::string::npos) << name;
    EXPECT_EQ(name.find("e_score"), std::string::npos) << name;
  }
  auto back = *model::ParameterStore::Create(*model::PlanModel(config), Precision::kFp32);
  const Status read = ReadWeights(dir / "m", back.get());
  ASSERT_TRUE(read.ok()) << read;
  EXPECT_TRUE(std::equal(back->master().begin(), back->master().end(), store->master().begin()));
  store->buffers()[0] = 0.5f;
  ASSERT_TRUE(WriteModelDir(dir / "m", config, WeightsOf(store.get()), {}).ok());
  EXPECT_EQ(json::parse(ReadAll(dir / "m/config.json"))["model_type"], "heddle");
  ASSERT_TRUE(ReadWeights(dir / "m", back.get()).ok());
  EXPECT_EQ(back->buffers()[0], 0.5f);
}

TEST(ModelDir, ReadsValuesThatAreNotFiniteOnlyWhenAsked) {
  TempDir dir;
  const heddle::v1::ModelConfig config = TinyConfig(Kind::kDense, true);
  Built built = Build(config, Precision::kFp32);
  built.store->master(*built.store->plan().Find("model.norm.weight"))[3] =
      std::numeric_limits<float>::infinity();
  ExportOptions options;
  options.allow_nonfinite = true;
  ASSERT_TRUE(WriteModelDir(dir / "m", config, WeightsOf(built.store.get()), options).ok());
  auto store = *model::ParameterStore::Create(*model::PlanModel(config), Precision::kFp32);
  EXPECT_NE(Message(ReadWeights(dir / "m", store.get())).find("model.norm.weight': element 3"),
            std::string::npos);
  ASSERT_TRUE(ReadWeights(dir / "m", store.get(), {.allow_nonfinite = true}).ok());
  EXPECT_TRUE(std::isinf(store->master(*store->plan().Find("model.norm.weight"))[3]));
}

// Ranges are those of the whole read, into memory or taken piece by piece; of a tensor longer than
// a piece too, and of a buffer that the folder lacks.
TEST(ModelDir, ReadsRangesAsItReadsTheWhole) {
  TempDir dir;
  heddle::v1::ModelConfig config = TinyConfig(Kind::kDense, true);
  config.set_vocab_size(70'000);
  config.mutable_moe()->set_n_experts(2);
  config.mutable_moe()->set_d_expert(5);
  const model::ModelPlan plan = *model::PlanModel(config);
  auto store = *model::ParameterStore::Create(plan, Precision::kFp32);
  model::InitParameters(5, store.get());
  ExportOptions options;
  options.shard_bytes_max = 3000;
  // As mixtral, which has no buffers.
  ASSERT_TRUE(WriteModelDir(dir / "m", config, WeightsOf(store.get()), options).ok());
  std::vector<model::TensorSpec> specs = plan.tensors;
  specs.insert(specs.end(), plan.buffers.begin(), plan.buffers.end());
  std::vector<std::vector<float>> filled, taken;
  std::vector<WeightRange> ranges;
  int pieces = 0;
  for (const model::TensorSpec& spec : specs) {
    const int64_t first = spec.elements / 3;
    const int64_t count = spec.elements - first - spec.elements / 5;
    filled.emplace_back(static_cast<size_t>(count), -1.0f);
    taken.emplace_back();
    ranges.push_back({spec.name, first, count, filled.back().data(), nullptr});
    ranges.push_back({spec.name, first, count, nullptr,
                      [&, first, to = taken.size() - 1](int64_t at, std::span<const float> part) {
                        EXPECT_EQ(at, first + static_cast<int64_t>(taken[to].size()));
                        taken[to].insert(taken[to].end(), part.begin(), part.end());
                        ++pieces;
                        return OkStatus();
                      }});
  }
  ranges.push_back({plan.tensors[0].name, 7, 0, nullptr, nullptr});
  const Status read = ReadWeightRanges(dir / "m", plan, ranges);
  ASSERT_TRUE(read.ok()) << read;
  EXPECT_EQ(taken, filled);
  EXPECT_GE(pieces, static_cast<int>(specs.size()));
  for (size_t i = 0; i < plan.tensors.size(); ++i) {
    const auto whole =
        store->master(plan.tensors[i])
            .subspan(static_cast<size_t>(plan.tensors[i].elements / 3), filled[i].size());
    EXPECT_TRUE(std::equal(whole.begin(), whole.end(), filled[i].begin())) << specs[i].name;
  }
  for (size_t i = plan.tensors.size(); i < specs.size(); ++i) {
    EXPECT_EQ(filled[i], std::vector<float>(filled[i].size(), 0.0f)) << specs[i].name;
  }
}

// One range asked for, everything compared.
TEST(ModelDir, ComparesAllTensorsWhateverRangeIsRead) {
  TempDir dir;
  const heddle::v1::ModelConfig config = TinyConfig(Kind::kDense, true);
  Built built = Build(config, Precision::kFp32);
  const model::ModelPlan& plan = built.store->plan();
  built.store->master(*plan.Find("model.norm.weight"))[3] = std::nanf("");
  ExportOptions options;
  options.allow_nonfinite = true;
  ASSERT_TRUE(WriteModelDir(dir / "m", config, WeightsOf(built.store.get()), options).ok());
  std::vector<float> values(2);
  const auto read = [&](const std::string& name, int64_t first) {
    return Message(
        ReadWeightRanges(dir / "m", plan, {{name, first, 2, values.data(), nullptr}}, {}));
  };
  EXPECT_EQ(read("model.norm.weight", 1), "");
  EXPECT_NE(read("model.norm.weight", 2).find("'model.norm.weight': element 3 is not finite"),
            std::string::npos);
  const WeightRange refused = {"model.norm.weight", 0, 2, nullptr,
                               [](int64_t, std::span<const float>) { return Internal("full"); }};
  EXPECT_EQ(Message(ReadWeightRanges(dir / "m", plan, {refused})), "full");

  heddle::v1::ModelConfig other = config;
  other.set_n_layers(4);
  other.set_d_ffn(30);
  const std::string differs = Message(ReadWeightRanges(
      dir / "m", *model::PlanModel(other), {{"model.norm.weight", 0, 2, values.data(), nullptr}}));
  EXPECT_NE(differs.find("missing model.layers.3.mlp.up_proj.weight"), std::string::npos);
  EXPECT_NE(differs.find("model.layers.0.mlp.up_proj.weight is [28,20], not [30,20]"),
            std::string::npos);

  const std::string path = dir / "m/model.safetensors";
  std::string file = ReadAll(path);
  const size_t entry = file.find("\"model.embed_tokens.weight\"");
  const size_t type = file.find("\"F32\"", entry);
  ASSERT_NE(type, std::string::npos);
  file.replace(type, 5, "\"I32\"");
  std::ofstream(path, std::ios::binary) << file;
  EXPECT_NE(read("model.norm.weight", 0).find("'model.embed_tokens.weight' is I32, not F32"),
            std::string::npos)
      << read("model.norm.weight", 0);
}

// A folder whose index and files disagree names every tensor in the wrong place.
TEST(ModelDir, ComparesTheIndexWithTheFiles) {
  TempDir dir;
  const heddle::v1::ModelConfig config = TinyConfig(Kind::kDense, true);
  Built built = Build(config, Precision::kFp32);
  ExportOptions options;
  options.shard_bytes_max = 4000;
  ASSERT_TRUE(WriteModelDir(dir / "m", config, WeightsOf(built.store.get()), options).ok());
  const std::string path = dir / "m/model.safetensors.index.json";
  const json index = json::parse(ReadAll(path));
  auto store = *model::ParameterStore::Create(*model::PlanModel(config), Precision::kFp32);
  const auto read_with = [&](const json& changed) {
    std::ofstream(path) << changed.dump();
    return Message(ReadWeights(dir / "m", store.get()));
  };
  json moved = index;
  moved["weight_map"]["model.norm.weight"] = index["weight_map"]["model.embed_tokens.weight"];
  EXPECT_NE(read_with(moved).find("model.norm.weight is in"), std::string::npos);
  json absent = index;
  absent["weight_map"]["model.layers.9.mlp.up_proj.weight"] =
      index["weight_map"]["model.norm.weight"];
  EXPECT_NE(read_with(absent).find("model.layers.9.mlp.up_proj.weight is not in"),
            std::string::npos);
  json unlisted = index;
  unlisted["weight_map"].erase("model.norm.weight");
  EXPECT_NE(read_with(unlisted).find("the index says nothing"), std::string::npos);
  for (const char* name : {"../m/x.safetensors", "/etc/passwd", "", ".hidden", "a/../b"}) {
    json escaped = index;
    escaped["weight_map"]["model.norm.weight"] = name;
    EXPECT_NE(read_with(escaped).find("bad file name"), std::string::npos) << name;
  }
  EXPECT_NE(read_with(json::array()).find("not an object"), std::string::npos);
  EXPECT_EQ(read_with(index), "");
}

// Old shards must not stay beside a new single file.
TEST(ModelDir, ReplacesTheFilesOfAnEarlierExport) {
  TempDir dir;
  const heddle::v1::ModelConfig config = TinyConfig(Kind::kDense, true);
  Built built = Build(config, Precision::kFp32);
  ExportOptions many;
  many.shard_bytes_max = 4000;
  ASSERT_TRUE(WriteModelDir(dir / "m", config, WeightsOf(built.store.get()), many).ok());
  ASSERT_TRUE(WriteModelDir(dir / "m", config, WeightsOf(built.store.get()), {}).ok());
  int files = 0;
  for (const auto& entry : fs::directory_iterator(dir / "m")) {
    files += entry.path().extension() == ".safetensors" ? 1 : 0;
  }
  EXPECT_EQ(files, 1);
  EXPECT_FALSE(fs::exists(dir / "m/model.safetensors.index.json"));
}

}  // namespace
}  // namespace heddle::hf
