#ifdef QERVE_HAS_AVX2
#include "simd_avx2.h"
#include "simd_ops.h"

void qerve_test::avx2_simd_ops(const SimdInputs& in, SimdOutputs& out) { AllSimdOps<qerve::SimdAvx2>::run(in, out); }
#endif
