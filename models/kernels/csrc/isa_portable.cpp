#include "simd_portable.h"
#include "table.h"

namespace qerve {

const Kernels* portable_kernels() {
    static const Kernels table = kernels_of<SimdPortable>("portable");
    return &table;
}

}  // namespace qerve
