// The kernels, for x86-64 with AVX2 and FMA (-mavx2 -mfma -mf16c).

#if defined(__x86_64__)
#define LLMCTL_KERNELS kAvx2Kernels
#define LLMCTL_ISA_NAME "avx2"
#include "kernels.inl"
#endif
