#include "simd_avx512.h"
// after the lanes
#include "amx.h"
#include "table.h"

namespace qerve {

namespace {

// A type of this file alone: with the one of isa_avx512.cpp the linker would keep one copy of every template for both,
// and a processor without tiles could get the code that was compiled for them.
struct Simd : SimdAvx512 {};

}  // namespace

const Kernels* amx_kernels() {
    static const Kernels table = [] {
        Kernels t = kernels_of<Simd>("amx");
        t.linear = linear_in_tiles<Simd>;
        t.linear_scratch_bytes = tile_scratch_bytes;
        t.multiply_adds = tile_multiply_adds;
        return t;
    }();
    return &table;
}

}  // namespace qerve
