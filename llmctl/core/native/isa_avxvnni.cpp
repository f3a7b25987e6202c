// The kernels, for x86-64 with AVX2 and AVX-VNNI (-mavx2 -mfma -mf16c -mavxvnni). A compiler that is too old for the last flag
// compiles this file without it, and then there are none.

#if defined(__x86_64__)
#if defined(__AVXVNNI__)
#define LLMCTL_KERNELS kAvxVnniKernels
#define LLMCTL_ISA_NAME "avxvnni"
#include "kernels.inl"
#else
#include "native.h"

namespace llmctl {
const Kernels kAvxVnniKernels = {"avxvnni", false, nullptr, nullptr, nullptr};
}
#endif
#endif
