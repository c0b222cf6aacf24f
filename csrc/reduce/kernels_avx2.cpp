#if defined(__x86_64__)
#define RINGFOLD_ISA avx2
#define RINGFOLD_TARGET __attribute__((target("avx2,f16c")))
#define RINGFOLD_VECTOR_NBYTES 32
#define RINGFOLD_F16C 1
#include "reduce/kernels_body.h"
#endif
