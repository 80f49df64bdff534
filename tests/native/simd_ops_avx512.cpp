#ifdef QERVE_HAS_AVX512
#include "simd_avx512.h"
#include "simd_ops.h"

void qerve_test::avx512_simd_ops(const SimdInputs& in, SimdOutputs& out) { AllSimdOps<qerve::SimdAvx512>::run(in, out); }
#endif
