#include "simd_avx512.h"
// after the lanes
#include "amx.h"
#include "table.h"

namespace qerve {

const Kernels* amx_kernels() {
    static const Kernels table = [] {
        Kernels t = kernels_of<SimdAvx512>("amx");
        t.linear = linear_in_tiles<SimdAvx512>;
        t.linear_scratch_bytes = tile_scratch_bytes;
        t.multiply_adds = tile_multiply_adds;
        return t;
    }();
    return &table;
}

}  // namespace qerve
