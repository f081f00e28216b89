#include "kernels/common/isa.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace heddle::kernels {
namespace {

// AMX-TILE and AMX-BF16 by cpuid: GCC 12 knows their names and never says yes.
bool HasTiles() {
  unsigned a = 0;
  unsigned b = 0;
  unsigned c = 0;
  unsigned d = 0;
  constexpr unsigned kTile = 1U << 24;
  constexpr unsigned kBf16 = 1U << 22;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & kTile) != 0 && (d & kBf16) != 0;
}

// Linux gives a process the tile registers when it asks for them: 8 KiB more in every thread's
// saved state. Linux: Documentation/arch/x86/xstate.rst.
bool MayUseTiles() {
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

Isa DetectIsa() {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16") && HasTiles() && MayUseTiles()) {
    return Isa::kAmx;
  }
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
