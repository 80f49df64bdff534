// Sixteen lanes in one AVX-512 register; see simd_portable.h for the meaning of every operation.
#pragma once

// The header of GCC up to 12 initializes results that are not read with themselves.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

#include <cstdint>
#include <cstring>

namespace qerve {

struct SimdAvx512 {
    // Of the register tiles: float variables that fit next to their operands, and query rows of attention.
    static constexpr int kAccumulators = 24;
    static constexpr int kTileRows = 6;

    using F = __m512;
    using I = __m512i;
    using B = __m512i;

    static F load(const float* p) { return _mm512_loadu_ps(p); }
    static void store(float* p, F a) { _mm512_storeu_ps(p, a); }
    static F set1(float x) { return _mm512_set1_ps(x); }
    static F zero() { return _mm512_setzero_ps(); }
    static F add(F a, F b) { return _mm512_add_ps(a, b); }
    static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static F div(F a, F b) { return _mm512_div_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static F max(F a, F b) { return _mm512_max_ps(a, b); }
    static F min(F a, F b) { return _mm512_min_ps(a, b); }
    static F abs(F a) { return _mm512_abs_ps(a); }
    static float reduce_add(F a) {
        __m256 h = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
        __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
        q = _mm_add_ps(q, _mm_movehl_ps(q, q));
        return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
    }
    static float reduce_max(F a) {
        __m256 h = _mm256_max_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
        __m128 q = _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
        q = _mm_max_ps(q, _mm_movehl_ps(q, q));
        return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
    }
    static F blend(int n, F first, F rest) {
        const uint32_t lanes = n <= 0 ? 0u : n >= 16 ? 0xffffu : (1u << n) - 1u;
        return _mm512_mask_blend_ps(static_cast<__mmask16>(lanes), rest, first);
    }
    template <int distance> static F swap(F a) {
        if constexpr (distance == 1) return _mm512_permute_ps(a, 0xb1);
        else if constexpr (distance == 2) return _mm512_permute_ps(a, 0x4e);
        else if constexpr (distance == 4) return _mm512_shuffle_f32x4(a, a, 0xb1);
        else return _mm512_shuffle_f32x4(a, a, 0x4e);
    }
    static F load_f16(const uint16_t* p) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    static void store_f16(uint16_t* p, F a) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }

    static I zero_i() { return _mm512_setzero_si512(); }
    static I set1_i(int32_t x) { return _mm512_set1_epi32(x); }
    static I load_i(const int32_t* p) { return _mm512_loadu_si512(p); }
    static void store_i(int32_t* p, I a) { _mm512_storeu_si512(p, a); }
    static I load_i8(const int8_t* p) {
        return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    static I load_i16(const int16_t* p) {
        return _mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    static void store_i8(int8_t* p, I a) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a));
    }
    static I add_i(I a, I b) { return _mm512_add_epi32(a, b); }
    static I sub_i(I a, I b) { return _mm512_sub_epi32(a, b); }
    static I mul_i(I a, I b) { return _mm512_mullo_epi32(a, b); }
    template <int n> static I shift_left(I a) { return _mm512_slli_epi32(a, n); }
    template <int n> static I shift_right(I a) { return _mm512_srai_epi32(a, n); }
    static int32_t reduce_add_i(I a) {
        const __m256i h = _mm256_add_epi32(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1));
        __m128i q = _mm_add_epi32(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
        q = _mm_add_epi32(q, _mm_shuffle_epi32(q, 0x4e));
        return _mm_cvtsi128_si32(_mm_add_epi32(q, _mm_shuffle_epi32(q, 0xb1)));
    }
    static F to_float(I a) { return _mm512_cvtepi32_ps(a); }
    static I round(F a) { return _mm512_cvtps_epi32(a); }
    static F as_float(I a) { return _mm512_castsi512_ps(a); }
    static I as_int(F a) { return _mm512_castps_si512(a); }

    static B load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
    template <int n, int width> static B field(B a) {
        return _mm512_and_si512(n == 0 ? a : _mm512_srli_epi16(a, n), _mm512_set1_epi8((1 << width) - 1));
    }
    static I dot(I acc, B weights, const int8_t* x) {
        int32_t four;
        std::memcpy(&four, x, 4);
        return _mm512_dpbusd_epi32(acc, weights, _mm512_set1_epi32(four));
    }
    static I dot_small(I acc, B weights, const int8_t* x) { return dot(acc, weights, x); }
};

}  // namespace qerve
