// Vectors of 16 bytes: SSE2 on x86-64, NEON on aarch64.
#define RINGFOLD_ISA baseline
#define RINGFOLD_TARGET
#define RINGFOLD_VECTOR_NBYTES 16
#define RINGFOLD_F16C 0
#include "reduce/kernels_body.h"
