// Which instruction set the kernels run with: decided once per process by cpuid, lowered (never
// raised) by HEDDLE_ISA = generic | avx2 | avx512 | amx (architecture.md S47).
#pragma once

namespace heddle::kernels {

enum class Isa { kGeneric = 0, kAvx2 = 1, kAvx512 = 2, kAmx = 3 };

// Thread-safe; the first call reads cpuid and the environment. An unknown value of HEDDLE_ISA is
// reported on stderr and ignored.
Isa SelectedIsa();

// Whether the processor has AVX-512's dot products of bf16 and SelectedIsa() allows AVX-512.
bool HasAvx512Bf16();

const char* IsaName(Isa isa);

}  // namespace heddle::kernels
