#include "simd_avx512.h"
#include "table.h"

namespace qerve {

const Kernels* avx512_kernels() {
    static const Kernels table = kernels_of<SimdAvx512>("avx512-vnni");
    return &table;
}

}  // namespace qerve
