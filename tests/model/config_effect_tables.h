// Which key shows in which small model (config_effect_test.cc).
#pragma once

#include <string>
#include <vector>

namespace heddle::model_test {

struct EffectRow {
  std::string key;                  // below `model`
  std::string base;                 // of inference_models.h
  std::string more;                 // text format, merged into the base
  std::vector<std::string> values;  // each must differ from the base and from the others;
                                    // elements of a list apart by blanks
  // The part that must differ: shapes, init, logits, decoded, loss, indexer loss, balance loss,
  // router loss, gradients, buffers. The place where the key works, not only the weights it adds.
  std::string shows;
};
std::vector<EffectRow> EffectRows();

struct OutsideRow {
  std::string key;
  std::string reason;  // why the model does not see it
  std::string file;
  std::string test;  // "Suite, Name"
};
std::vector<OutsideRow> RowsOutsideTheModel();

struct RefusedRow {
  std::string key;
  std::string value;
  std::string reason;  // the problem of PlanModel starts with it
};
std::vector<RefusedRow> RefusedRows();

}  // namespace heddle::model_test
