#ifdef QERVE_HAS_AVXVNNI
#include "simd_avxvnni.h"
#include "simd_ops.h"

void qerve_test::avxvnni_simd_ops(const SimdInputs& in, SimdOutputs& out) { AllSimdOps<qerve::SimdAvxVnni>::run(in, out); }
#endif
