#include "checkpoint/catalog/tensors.h"

#include <algorithm>
#include <limits>

namespace heddle::checkpoint {

uint64_t ElementBytes(heddle::v1::ElementType type) {
  switch (type) {
    case heddle::v1::ELEMENT_TYPE_F32:
      return 4;
    case heddle::v1::ELEMENT_TYPE_BF16:
      return 2;
    case heddle::v1::ELEMENT_TYPE_F64:
    case heddle::v1::ELEMENT_TYPE_I64:
      return 8;
  }
  return 8;
}

uint64_t ChunkElements(heddle::v1::ElementType type) { return kChunkBytes / ElementBytes(type); }

heddle::v1::ElementType TypeOf(const heddle::v1::TensorInfo& tensor,
                               heddle::v1::TensorClass tensor_class) {
  const bool moment = tensor_class == heddle::v1::TENSOR_CLASS_MOMENT1 ||
                      tensor_class == heddle::v1::TENSOR_CLASS_MOMENT2;
  return moment ? tensor.moment_type() : tensor.master_type();
}

uint64_t Elements(const heddle::v1::TensorInfo& tensor) {
  uint64_t elements = 1;
  for (const int64_t size : tensor.shape()) {
    if (size <= 0) {
      return 0;
    }
    if (elements > std::numeric_limits<uint64_t>::max() / 16 / static_cast<uint64_t>(size)) {
      return 0;
    }
    elements *= static_cast<uint64_t>(size);
  }
  return elements;
}

std::string_view ToText(heddle::v1::TensorClass tensor_class) {
  switch (tensor_class) {
    case heddle::v1::TENSOR_CLASS_MASTER:
      return "master";
    case heddle::v1::TENSOR_CLASS_MOMENT1:
      return "moment1";
    case heddle::v1::TENSOR_CLASS_MOMENT2:
      return "moment2";
    case heddle::v1::TENSOR_CLASS_BUFFER:
      return "buffer";
  }
  return "unknown";
}

std::vector<std::string> CoverProblems(std::vector<ElementSpan> spans, uint64_t elements) {
  std::sort(spans.begin(), spans.end(), [](const ElementSpan& a, const ElementSpan& b) {
    return a.first != b.first ? a.first < b.first : a.count < b.count;
  });
  std::vector<std::string> problems;
  uint64_t covered = 0;  // [0, covered) is there
  for (const ElementSpan& span : spans) {
    if (span.count == 0) {
      problems.push_back(Str("an empty range at ", span.first));
      continue;
    }
    if (span.first > elements || span.count > elements - span.first) {
      problems.push_back(Str("elements [", span.first, ", +", span.count, ") of ", elements));
      return problems;
    }
    if (span.first > covered) {
      problems.push_back(Str("elements [", covered, ", ", span.first, ") are missing"));
    } else if (span.first < covered) {
      problems.push_back(Str("elements [", span.first, ", ",
                             std::min(covered, span.first + span.count), ") are there twice"));
    }
    covered = std::max(covered, span.first + span.count);
  }
  if (covered < elements) {
    problems.push_back(Str("elements [", covered, ", ", elements, ") are missing"));
  }
  return problems;
}

}  // namespace heddle::checkpoint
