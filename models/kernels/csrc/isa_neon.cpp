#include "simd_neon.h"
#include "table.h"

namespace qerve {

const Kernels* neon_kernels() {
    static const Kernels table = kernels_of<SimdNeon>("neon-dotprod");
    return &table;
}

}  // namespace qerve
