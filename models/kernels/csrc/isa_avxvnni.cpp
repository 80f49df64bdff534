#include "simd_avxvnni.h"
#include "table.h"

namespace qerve {

const Kernels* avxvnni_kernels() {
    static const Kernels table = kernels_of<SimdAvxVnni>("avx-vnni");
    return &table;
}

}  // namespace qerve
