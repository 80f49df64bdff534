// AVX2 with the 8-bit dot product of AVX-VNNI.
#pragma once

#include "simd_avx2.h"

namespace qerve {

struct SimdAvxVnni : SimdAvx2 {
    static I dot(I acc, B weights, const int8_t* x) {
        const __m256i four = four_bytes(x);
        return {_mm256_dpbusd_avx_epi32(acc.low, weights.low, four), _mm256_dpbusd_avx_epi32(acc.high, weights.high, four)};
    }
    static I dot_small(I acc, B weights, const int8_t* x) { return dot(acc, weights, x); }
};

}  // namespace qerve
