#include "simd_avx2.h"
#include "table.h"

namespace qerve {

const Kernels* avx2_kernels() {
    static const Kernels table = kernels_of<SimdAvx2>("avx2");
    return &table;
}

}  // namespace qerve
