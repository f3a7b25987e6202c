// The kernels, with no more than the platform's baseline: SSE2 on x86-64, NEON on ARM.

#define LLMCTL_KERNELS kBaselineKernels
#define LLMCTL_ISA_NAME "baseline"
#include "kernels.inl"
