#if defined(__x86_64__)
#define RINGFOLD_ISA avx512
#define RINGFOLD_TARGET __attribute__((target("avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl")))
#define RINGFOLD_VECTOR_NBYTES 64
#define RINGFOLD_F16C 1
#include "reduce/kernels_body.h"
#endif
