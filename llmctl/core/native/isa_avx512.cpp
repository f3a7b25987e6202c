// The kernels, for x86-64 with AVX-512 (-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mfma).

#if defined(__x86_64__)
#define LLMCTL_KERNELS kAvx512Kernels
#define LLMCTL_ISA_NAME "avx512"
#include "kernels.inl"
#endif
