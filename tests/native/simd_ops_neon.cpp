#ifdef QERVE_HAS_NEON
#include "simd_neon.h"
#include "simd_ops.h"

void qerve_test::neon_simd_ops(const SimdInputs& in, SimdOutputs& out) { AllSimdOps<qerve::SimdNeon>::run(in, out); }
#endif
