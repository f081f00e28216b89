// Names of tensors in the files of an architecture, to ours and back (formats.md F15). Ours are
// Hugging Face's of Llama and DeepSeek-V3 already; Mixtral names its experts differently, and
// DeepSeek-V3.2 two projections of its indexer. Internal to model/hf.
#pragma once

#include <string>

#include "model/hf/config_json.h"

namespace heddle::hf {

// Our name of a file's tensor; unknown names stay as they are.
std::string OurName(const std::string& file_name, Architecture architecture);
// The file's name of our tensor.
std::string FileName(const std::string& our_name, Architecture architecture);

// Whether a tensor of a file is known to carry nothing: tables that follow from config.json.
bool CarriesNothing(const std::string& file_name);

}  // namespace heddle::hf
