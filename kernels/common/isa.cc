#include "kernels/common/isa.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace heddle::kernels {
namespace {

Isa DetectIsa() {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512) return Isa::kAvx512;
  return avx2 ? Isa::kAvx2 : Isa::kGeneric;
}

Isa LimitedIsa(Isa detected) {
  const char* wanted = std::getenv("HEDDLE_ISA");
  if (wanted == nullptr || *wanted == '\0') return detected;
  for (const Isa isa : {Isa::kGeneric, Isa::kAvx2, Isa::kAvx512, Isa::kAmx}) {
    if (std::strcmp(wanted, IsaName(isa)) == 0) return std::min(isa, detected);
  }
  std::fprintf(stderr, "heddle: HEDDLE_ISA: '%s' is none of generic, avx2, avx512, amx\n", wanted);
  return detected;
}

}  // namespace

const char* IsaName(Isa isa) {
  switch (isa) {
    case Isa::kGeneric:
      return "generic";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAmx:
      return "amx";
  }
  return "generic";
}

bool HasAvx512Bf16() {
  static const bool has =
      SelectedIsa() >= Isa::kAvx512 && __builtin_cpu_supports("avx512bf16") != 0;
  return has;
}

Isa SelectedIsa() {
  static const Isa selected = LimitedIsa(DetectIsa());
  return selected;
}

}  // namespace heddle::kernels
