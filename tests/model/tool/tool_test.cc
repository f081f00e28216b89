#include <ATen/core/Tensor.h>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "checkpoint/tensor_io/save.h"
#include "data/tokenizer/bpe_trainer.h"
#include "heddle/v1/checkpoints.pb.h"
#include "model/hf/model_dir.h"
#include "model/hf/safetensors.h"
#include "model/inference/decoder.h"
#include "model/inference/generate.h"
#include "model/model_costs.h"
#include "model/tool/verbs.h"
#include "tests/model/tiny_model.h"

namespace heddle::tool {
namespace {

namespace fs = std::filesystem;
using model_test::BatchData;
using model_test::Build;
using model_test::Built;
using model_test::Kind;
using model_test::RandomBatch;
using model_test::TinyConfig;
using nlohmann::json;

class Tool : public testing::Test {
 protected:
  Tool()
      : config_(TinyConfig(Kind::kHybrid, true)), built_(Build(config_, model::Precision::kFp32)) {
    std::string name = fs::temp_directory_path() / "heddle-tool-XXXXXX";
    path_ = mkdtemp(name.data());
    WriteModel(built_);
    folder_.dir = path_ / "model";
  }
  ~Tool() override { fs::remove_all(path_); }

  void WriteModel(const Built& built) {
    std::vector<hf::NamedWeight> weights;
    for (const model::TensorSpec& tensor : built.store->plan().tensors) {
      weights.push_back({tensor.name, tensor.shape, built.store->master(tensor)});
    }
    EXPECT_TRUE(hf::WriteModelDir(path_ / "model", config_, weights, {}).ok());
  }

  // A committed checkpoint of the model, written by `world` ranks, as the trainer writes it.
  SourceOptions WriteCheckpoint(uint32_t world) {
    std::vector<v1::TensorInfo> tensors;
    for (const model::TensorSpec& spec : built_.store->plan().tensors) {
      v1::TensorInfo info;
      info.set_name(spec.name);
      for (const int64_t extent : spec.shape) info.add_shape(extent);
      info.set_master_type(v1::ELEMENT_TYPE_F32);
      info.set_moment_type(v1::ELEMENT_TYPE_F32);
      info.add_classes(v1::TENSOR_CLASS_MASTER);
      tensors.push_back(info);
    }
    tensors = *checkpoint::NumberTensors(tensors);
    v1::CheckpointRecord record;
    record.set_dir("j-1/f1/step-5");
    record.set_world_size(world);
    v1::RunConfig run;
    *run.mutable_model() = config_;
    record.mutable_train_state()->set_resolved_config(run.SerializeAsString());
    std::vector<checkpoint::LocalRange> whole;
    for (const v1::TensorInfo& info : tensors) {
      *record.add_tensors() = info;
      const std::span<float> values = built_.store->master(*built_.store->plan().Find(info.name()));
      whole.push_back({info.id(), v1::TENSOR_CLASS_MASTER, 0, values.size(), values.data()});
    }
    fs::create_directories(path_ / "root");
    for (uint32_t rank = 0; rank < world; ++rank) {
      checkpoint::Snapshot snapshot;
      EXPECT_TRUE(
          snapshot.Stage(tensors, checkpoint::ReplicaShare(tensors, whole, rank, world)).ok());
      checkpoint::ShardWriterOptions options;
      options.root = path_ / "root";
      options.dir = record.dir();
      options.header.set_format_version(1);
      options.header.set_step(5);
      options.header.set_rank(rank);
      options.header.set_world_size(world);
      const auto files = snapshot.Write(options);
      EXPECT_TRUE(files.ok()) << files.status();
      v1::RankSeal* seal = record.add_seals();
      seal->set_rank(rank);
      for (const v1::ShardFile& file : *files) *seal->add_files() = file;
    }
    record.set_step(5);
    std::ofstream(path_ / "record", std::ios::binary) << record.SerializeAsString();
    SourceOptions source;
    source.record = path_ / "record";
    source.root = path_ / "root";
    return source;
  }

  json Captured(const std::function<Status()>& run) {
    testing::internal::CaptureStdout();
    const Status status = run();
    const std::string text = testing::internal::GetCapturedStdout();
    EXPECT_TRUE(status.ok()) << status;
    return json::parse(text);
  }

  fs::path path_;
  heddle::v1::ModelConfig config_;
  Built built_;
  SourceOptions folder_;
};

TEST_F(Tool, ShowsTheExactCount) {
  const json shown = Captured([&] { return RunShow({folder_, true}); });
  EXPECT_EQ(shown["parameters"], built_.store->plan().parameters);
  EXPECT_EQ(shown["tensors"].size(), built_.store->plan().tensors.size());
  EXPECT_EQ(shown["config"]["attention"]["pattern"], json({"swa", "dense"}));
}

TEST_F(Tool, ShowsWhatAModelCostsAgainstItsDenseTwin) {
  ShowOptions options = {{}, true, false, {16384, 2048, 2048}};
  options.source.dir = "small-gsa";
  const json shown = Captured([&] { return RunShow(options); });
  EXPECT_EQ(shown["parameters"], 34'502'208);
  // b (2 Hk D + dI) of 8 layers; in FP8 2 Hk (D + 4) + b dI.
  EXPECT_EQ(shown["kv_cache_bytes_per_token"]["bf16"], 8 * (2 * 2 * 64 + 64) * 2);
  EXPECT_EQ(shown["kv_cache_bytes_per_token"]["fp8"], 8 * (2 * 2 * 68 + 64 * 2));
  ASSERT_EQ(shown["speed_up_over_dense"].size(), 2u);
  const json& row = shown["speed_up_over_dense"][1];
  EXPECT_EQ(row["sequence_length"], 16384);
  const model::SpeedUp speed = model::SpeedUpOverDense(
      [] {
        heddle::v1::ModelConfig config;
        config.set_d_model(512);
        config.set_n_layers(8);
        config.set_n_heads(8);
        config.set_n_kv_heads(2);
        config.set_d_ffn(1376);
        config.mutable_attention()->set_kind(v1::ATTENTION_KIND_GSA);
        config.mutable_attention()->mutable_gsa()->set_k_base(256);
        return config;
      }(),
      16384);
  EXPECT_DOUBLE_EQ(row["core_training"].get<double>(), speed.core_training);
  EXPECT_DOUBLE_EQ(row["step_training"].get<double>(), speed.step_training);
  EXPECT_GT(shown["break_even_length"].get<int64_t>(), 256);
}

// attention-and-moe.md section 12: `dsa-medium` cannot be faster, and is told so.
TEST_F(Tool, ShowSaysSoWhenAPresetCannotBeFaster) {
  ShowOptions options;
  options.source.dir = "dsa-medium";
  testing::internal::CaptureStdout();
  EXPECT_TRUE(RunShow(options).ok());
  const std::string table = testing::internal::GetCapturedStdout();
  EXPECT_NE(table.find("no step speed-up is possible: up to max_position_embeddings = 128"),
            std::string::npos)
      << table;
  EXPECT_NE(table.find("20954368"), std::string::npos);
  options.json = true;
  const json shown = Captured([&] { return RunShow(options); });
  EXPECT_TRUE(shown["break_even_length"].is_null());
  EXPECT_LT(shown["active_parameters"].get<int64_t>(), shown["parameters"].get<int64_t>());
  options.source.dir = "tiny-dense";
  EXPECT_EQ(Captured([&] { return RunShow(options); })["verdict"], "");
  options.lengths = {0};
  EXPECT_EQ(RunShow(options).code(), StatusCode::kInvalidArgument);
  options.source.dir = "no-such-preset";
  EXPECT_EQ(RunShow(options).code(), StatusCode::kNotFound);
}

TEST_F(Tool, LogitsOfPaddedAndPackedInputAreTheModels) {
  const BatchData batch = RandomBatch({6, 6, 6}, config_.vocab_size(), 9);
  const at::Tensor expected = *built_.model->Logits(batch.view());
  for (const bool packed : {false, true}) {
    std::vector<hf::WriteTensor> tensors = {
        {"input_ids", hf::DType::kI64,
         packed ? std::vector<int64_t>{18} : std::vector<int64_t>{3, 6}, batch.ids.data()}};
    if (packed) tensors.push_back({"cu_seqlens", hf::DType::kI32, {4}, batch.cu.data()});
    ASSERT_TRUE(hf::WriteSafetensors(path_ / "in", tensors).ok());
    const Status status = RunLogits({folder_, path_ / "in", path_ / "out"});
    ASSERT_TRUE(status.ok()) << status;
    const auto out = *hf::SafetensorsFile::Open(path_ / "out");
    EXPECT_EQ(out->header().tensors.at("logits").shape,
              packed ? (std::vector<int64_t>{18, 37}) : (std::vector<int64_t>{3, 6, 37}));
    std::vector<float> logits(18 * 37);
    ASSERT_TRUE(out->ReadFloats("logits", logits).ok());
    for (size_t i = 0; i < logits.size(); ++i) {
      ASSERT_EQ(logits[i], expected.data_ptr<float>()[i]);
    }
  }
}

TEST_F(Tool, LogitsNeverReplaceTheirInput) {
  const BatchData batch = RandomBatch({6}, config_.vocab_size(), 9);
  const fs::path in = path_ / "in";
  ASSERT_TRUE(
      hf::WriteSafetensors(in, {{"input_ids", hf::DType::kI64, {1, 6}, batch.ids.data()}}).ok());
  fs::create_symlink(in, path_ / "link");
  fs::create_hard_link(in, path_ / "twin");
  for (const fs::path& out : {in, path_ / "link", path_ / "twin", path_ / "model" / ".." / "in"}) {
    const Status status = RunLogits({folder_, in, out});
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument) << out;
    EXPECT_EQ(Message(status).rfind("--out: is the input itself", 0), 0u) << status;
  }
  EXPECT_TRUE((*hf::SafetensorsFile::Open(in))->header().tensors.contains("input_ids"));
  EXPECT_FALSE(RunLogits({folder_, path_ / "none", path_ / "none"}).ok());
}

// C6: a row of the padded batch is the model's of its tokens alone, padding gives zeros.
TEST_F(Tool, C6LogitsOfPaddingAreZero) {
  const std::vector<int64_t> ids = {0, 0, 5, 6, 7, 8, 9, 0, 0, 0, 0, 0};
  std::vector<int64_t> mask = {0, 0, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0};
  const auto run = [&] {
    const std::vector<hf::WriteTensor> tensors = {
        {"input_ids", hf::DType::kI64, {3, 4}, ids.data()},
        {"attention_mask", hf::DType::kI64, {3, 4}, mask.data()}};
    EXPECT_TRUE(hf::WriteSafetensors(path_ / "in", tensors).ok());
    return RunLogits({folder_, path_ / "in", path_ / "out"});
  };
  const Status status = run();
  ASSERT_TRUE(status.ok()) << status;
  const auto out = *hf::SafetensorsFile::Open(path_ / "out");
  EXPECT_EQ(out->header().tensors.at("logits").shape, (std::vector<int64_t>{3, 4, 37}));
  std::vector<float> logits(12 * 37);
  ASSERT_TRUE(out->ReadFloats("logits", logits).ok());
  const std::vector<int64_t> tokens = {5, 6, 7, 8, 9};
  const std::vector<int32_t> cu = {0, 2, 5};
  const at::Tensor expected = *built_.model->Logits({tokens, {}, cu});
  for (size_t i = 0; i < logits.size(); ++i) {
    const bool valid = i >= 2 * 37 && i < 7 * 37;
    ASSERT_EQ(logits[i], valid ? expected.data_ptr<float>()[i - 2 * 37] : 0.0f) << i;
  }
  mask[3] = 0;
  EXPECT_TRUE(run().ok());
  mask[5] = 0;
  EXPECT_NE(Message(run()).find("padding between tokens before [1, 2]"), std::string::npos);
  mask[5] = 2;
  EXPECT_NE(Message(run()).find("attention_mask: 2 at [1, 1]"), std::string::npos);
}

TEST_F(Tool, GeneratesWhatTheDecoderGenerates) {
  GenerateVerbOptions options;
  options.source = folder_;
  options.ids = {"5,3,1"};
  options.max_new_tokens = 9;
  options.temperature = 0.8;
  options.seed = 4;
  options.json = true;
  const json made = Captured([&] { return RunGenerate(options); });
  const auto decoder = *inference::Decoder::Create(config_, built_.store.get());
  const std::vector<inference::Prompt> prompts = {{{5, 3, 1}, 0}};
  inference::GenerateOptions same;
  same.max_new_tokens = 9;
  same.sampling.temperature = 0.8;
  same.sampling.seed = 4;
  const std::vector<inference::Generated> expected =
      *inference::Generate(decoder.get(), prompts, same);
  EXPECT_EQ(made["ids"].get<std::vector<int64_t>>(), expected[0].ids);
  EXPECT_EQ(made["finish"], "max_new_tokens");
  EXPECT_EQ(made["prompt_tokens"], 3);
  EXPECT_EQ(made["kv_cache_bytes"], model::KvCacheBytes(config_, 3 + 8, 4));
  EXPECT_GT(made["tokens_per_second"].get<double>(), 0.0);
}

TEST_F(Tool, StopsAtTheEosOfTheFolder) {
  GenerateVerbOptions options;
  options.source = folder_;
  options.ids = {"5,3,1"};
  options.max_new_tokens = 9;
  options.temperature = 0.8;
  options.seed = 4;
  options.json = true;
  const auto ids = [&] {
    return Captured([&] { return RunGenerate(options); })["ids"].get<std::vector<int64_t>>();
  };
  const std::vector<int64_t> free = ids();
  const auto until = [&](const std::vector<int64_t>& eos) {
    const auto end = std::find_first_of(free.begin(), free.end(), eos.begin(), eos.end());
    return std::vector<int64_t>(free.begin(), end == free.end() ? end : end + 1);
  };
  const std::string config = path_ / "model/config.json";
  const std::string generation = path_ / "model/generation_config.json";
  const auto set = [](const std::string& path, const json& eos) {
    json object = json::object();
    if (fs::exists(path)) object = json::parse(std::ifstream(path));
    object["eos_token_id"] = eos;
    std::ofstream(path) << object;
  };
  set(config, free[4]);
  EXPECT_EQ(ids(), until({free[4]}));
  set(generation, nullptr);  // says nothing
  EXPECT_EQ(ids(), until({free[4]}));
  set(generation, {free[3], free[2]});  // wins over config.json
  EXPECT_EQ(ids(), until({free[2], free[3]}));

  // What a folder says goes into the exported config.json.
  ExportVerbOptions exported;
  exported.source = folder_;
  exported.out = path_ / "exported";
  exported.json = true;
  Captured([&] { return RunExport(exported); });
  EXPECT_EQ(*hf::ReadEosIds(exported.out, 37), (std::vector<int64_t>{free[3], free[2]}));
}

TEST_F(Tool, RefusesAnEosThatIsNoTokenOfTheModel) {
  for (const char* name : {"config.json", "generation_config.json"}) {
    const fs::path path = path_ / "model" / name;
    for (const char* eos : {"\"2\"", "1.0", "true", "{}", "[[1]]", "[1, null]", "37", "-1",
                            "[0, 37]", "18446744073709551615"}) {
      json object = json::object();
      if (fs::exists(path)) object = json::parse(std::ifstream(path));
      object["eos_token_id"] = json::parse(eos);
      std::ofstream(path) << object;
      const Status status = RunShow({folder_, true});
      EXPECT_EQ(status.code(), StatusCode::kInvalidArgument) << name << " " << eos;
      EXPECT_NE(Message(status).find(Str(path.string(), ": eos_token_id: ")), std::string::npos)
          << Message(status);
    }
    fs::remove(path_ / "model/generation_config.json");
    json object = json::parse(std::ifstream(path_ / "model/config.json"));
    object.erase("eos_token_id");
    std::ofstream(path_ / "model/config.json") << object;
  }
}

TEST_F(Tool, GeneratesABatchAsItGeneratesEachPromptAlone) {
  GenerateVerbOptions options;
  options.source = folder_;
  options.ids = {"5,3,1", "7", "2,2,2,2,2,2,2,2,2"};
  options.max_new_tokens = 6;
  options.json = true;
  const json batch = Captured([&] { return RunGenerate(options); });
  ASSERT_EQ(batch["sequences"].size(), 3u);
  for (size_t i = 0; i < 3; ++i) {
    GenerateVerbOptions alone = options;
    alone.ids = {options.ids[i]};
    EXPECT_EQ(Captured([&] { return RunGenerate(alone); })["ids"], batch["sequences"][i]["ids"]);
  }
}

TEST_F(Tool, GeneratesWithAQuantisedCache) {
  GenerateVerbOptions options;
  options.source = folder_;
  options.ids = {"5,3,1"};
  options.max_new_tokens = 30;
  options.json = true;
  const json wide = Captured([&] { return RunGenerate(options); });
  for (const char* word : {"fp8", "int8"}) {
    options.overrides = {Str("memory.kv_cache.quantization=", word), "memory.kv_cache.threshold=4"};
    const json made = Captured([&] { return RunGenerate(options); });
    EXPECT_EQ(made["ids"].size(), 30u);
    EXPECT_LT(made["kv_cache_bytes"].get<int64_t>(), wide["kv_cache_bytes"].get<int64_t>());
    // Above the length of the sequence, a threshold changes nothing.
    options.overrides[1] = "memory.kv_cache.threshold=100";
    EXPECT_EQ(Captured([&] { return RunGenerate(options); })["ids"], wide["ids"]);
  }
}

TEST_F(Tool, ExportsACheckpointOfAnyWorldSize) {
  for (const uint32_t world : {1u, 3u}) {
    const SourceOptions source = WriteCheckpoint(world);
    ExportVerbOptions options;
    options.source = source;
    options.out = path_ / "exported";
    options.json = true;
    const json report = Captured([&] { return RunExport(options); });
    EXPECT_EQ(report["parameters"], built_.store->plan().parameters);
    auto store =
        *model::ParameterStore::Create(*model::PlanModel(config_), model::Precision::kFp32);
    ASSERT_TRUE(hf::ReadWeights(path_ / "exported", store.get()).ok());
    ASSERT_TRUE(
        std::equal(store->master().begin(), store->master().end(), built_.store->master().begin()));
    fs::remove_all(path_ / "root");
  }
}

TEST_F(Tool, ImportsUnderAnotherAttentionWithTheSameTensors) {
  ExportVerbOptions options;
  options.source = folder_;
  options.out = path_ / "windowed";
  options.overrides = {"model.attention.pattern=[swa]", "model.attention.swa.window=3"};
  options.json = true;
  Captured([&] { return RunExport(options); });
  const heddle::v1::ModelConfig config = *hf::ReadModelConfig(options.out);
  EXPECT_EQ(model::LayerKind(config, 1), v1::ATTENTION_KIND_SWA);
  EXPECT_EQ(config.attention().swa().window(), 3);
  auto store = *model::ParameterStore::Create(*model::PlanModel(config), model::Precision::kFp32);
  EXPECT_TRUE(hf::ReadWeights(options.out, store.get()).ok());
  options.overrides = {"model.d_ffn=30"};
  EXPECT_NE(Message(RunExport(options)).find("mlp.gate_proj"), std::string::npos);
  options.overrides = {"training.seed=3"};
  EXPECT_EQ(RunExport(options).code(), StatusCode::kInvalidArgument);
}

// A tokenizer of 257 ids, with `type` as the type of one of its parts.
json TokenizerJson(const std::string& part, const std::string& type) {
  tokenizer::BpeTrainerOptions options;
  options.vocab_size = 257;
  const auto trainer = *tokenizer::BpeTrainer::Create(options);
  EXPECT_TRUE(trainer->Add("text").ok());
  json object = json::parse(*trainer->Finish({}));
  if (!part.empty()) object[part] = {{"type", type}};
  return object;
}

TEST_F(Tool, ImportSaysThatATokenizerCannotBeUsed) {
  config_.set_vocab_size(257);
  WriteModel(Build(config_, model::Precision::kFp32));
  ExportVerbOptions options;
  options.source = folder_;
  options.out = path_ / "imported";
  options.json = true;
  const std::string path = path_ / "model/tokenizer.json";
  const auto warnings = [&](const json& tokenizer) {
    std::ofstream(path) << tokenizer;
    testing::internal::CaptureStderr();
    const json report = Captured([&] { return RunExport(options); });
    const std::string told = testing::internal::GetCapturedStderr();
    EXPECT_EQ(json::parse(std::ifstream(path_ / "imported/tokenizer.json")), tokenizer)
        << "other programs may use it";
    EXPECT_EQ(told.empty(), report["warnings"].empty());
    for (const json& warning : report["warnings"]) {
      EXPECT_NE(told.find(Str("heddle: ", warning.get<std::string>(), "\n")), std::string::npos);
    }
    return report["warnings"].dump();
  };
  EXPECT_EQ(warnings(TokenizerJson("", "")), "[]");
  for (const auto& [part, type] : {std::pair{"model", "Unigram"},
                                   {"decoder", "WordPiece"},
                                   {"normalizer", "Precompiled"},
                                   {"pre_tokenizer", "Punctuation"}}) {
    const std::string text = warnings(TokenizerJson(part, type));
    EXPECT_NE(text.find(path), std::string::npos) << text;
    EXPECT_NE(text.find(type), std::string::npos) << text;
    EXPECT_NE(text.find("--ids"), std::string::npos) << text;
  }
  json larger = TokenizerJson("", "");
  larger["added_tokens"] = {{{"id", 300}, {"content", "<pad>"}, {"special", true}}};
  EXPECT_NE(warnings(larger).find("has 301 token ids, the model 257"), std::string::npos);
}

TEST_F(Tool, ImportRefusesAGivenTokenizerThatCannotBeUsed) {
  ExportVerbOptions options;
  options.source = folder_;
  options.source.tokenizer = path_ / "given.json";
  options.out = path_ / "imported";
  std::ofstream(options.source.tokenizer) << TokenizerJson("model", "Unigram");
  const Status refused = RunExport(options);
  EXPECT_EQ(refused.code(), StatusCode::kInvalidArgument);
  EXPECT_NE(Message(refused).find("given.json: model of type Unigram"), std::string::npos);
  EXPECT_FALSE(fs::exists(options.out));
}

TEST_F(Tool, RefusesADamagedCheckpointAndWritesNothing) {
  const SourceOptions source = WriteCheckpoint(1);
  fs::path file;
  for (const auto& entry : fs::recursive_directory_iterator(path_ / "root")) {
    if (entry.is_regular_file()) file = entry.path();
  }
  std::fstream damage(file, std::ios::in | std::ios::out | std::ios::binary);
  damage.seekp(static_cast<std::streamoff>(fs::file_size(file) / 2));
  damage.put('\x5a');
  damage.close();
  ExportVerbOptions options;
  options.source = source;
  options.out = path_ / "exported";
  EXPECT_EQ(RunExport(options).code(), StatusCode::kDataLoss);
  EXPECT_FALSE(fs::exists(path_ / "exported"));
}

TEST_F(Tool, SaysWhatIsWrongWithItsOptions) {
  EXPECT_EQ(RunShow({}).code(), StatusCode::kInvalidArgument);
  SourceOptions both = folder_;
  both.record = "x";
  EXPECT_EQ(RunShow({both, false}).code(), StatusCode::kInvalidArgument);
  GenerateVerbOptions generate;
  generate.source = folder_;
  EXPECT_NE(Message(RunGenerate(generate)).find("--prompt"), std::string::npos);
  generate.prompts = {"text"};
  EXPECT_EQ(RunGenerate(generate).code(), StatusCode::kNotFound);  // no tokenizer
  generate.prompts.clear();
  generate.ids = {"1,2"};
  const auto refused = [&](std::vector<std::string> overrides) {
    generate.overrides = std::move(overrides);
    const Status status = RunGenerate(generate);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    return Message(status);
  };
  EXPECT_NE(refused({"memory.kv_cache.quantization=fp4"}).find("fp8"), std::string::npos);
  EXPECT_NE(refused({"memory.kv_cache.threshold=4"}).find("no effect"), std::string::npos);
  EXPECT_NE(refused({"training.seed=4"}).find("training.seed=4"), std::string::npos);
  for (const char* ids : {"", "1,,2", "1,x", "1 2", ","}) {
    generate.ids = {ids};
    EXPECT_NE(refused({}).find("--ids"), std::string::npos) << ids;
  }
  generate.ids = {"1,37"};
  EXPECT_NE(refused({}).find("37"), std::string::npos);
}

// Exit status of the contract, from the program itself.
TEST_F(Tool, EndsWithTheStatusOfTheContract) {
  const char* bin = std::getenv("HEDDLE_BIN");
  ASSERT_NE(bin, nullptr);
  const auto run = [&](std::vector<std::string> words) {
    words.insert(words.begin(), Str(bin, "/heddle-model"));
    std::vector<char*> argv;
    for (std::string& word : words) argv.push_back(word.data());
    argv.push_back(nullptr);
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    const std::string out = path_ / "o", error = path_ / "e";
    posix_spawn_file_actions_addopen(&actions, 1, out.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
    posix_spawn_file_actions_addopen(&actions, 2, error.c_str(), O_WRONLY | O_CREAT | O_TRUNC,
                                     0600);
    pid_t child = 0;
    EXPECT_EQ(posix_spawn(&child, argv[0], &actions, nullptr, argv.data(), environ), 0);
    posix_spawn_file_actions_destroy(&actions);
    int status = 0;
    EXPECT_EQ(waitpid(child, &status, 0), child);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  };
  EXPECT_EQ(run({"show", folder_.dir}), 0);
  EXPECT_EQ(run({"show", folder_.dir + "/none"}), 3);
  EXPECT_EQ(run({"show"}), 2);
  EXPECT_EQ(run({"frobnicate"}), 2);
  std::ifstream error(path_ / "e");
  std::string text;
  std::getline(error, text);
  EXPECT_EQ(text.rfind("heddle: ", 0), 0u) << text;
}

}  // namespace
}  // namespace heddle::tool
