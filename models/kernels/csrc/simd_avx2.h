// Sixteen lanes in two AVX2 registers; see simd_portable.h for the meaning of every operation.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace qerve {

struct SimdAvx2 {
    static constexpr int kTileRows = 6;
    static constexpr int kAccumulators = 6;

    struct F { __m256 low, high; };
    struct I { __m256i low, high; };
    struct B { __m256i low, high; };

    static F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
    static void store(float* p, F a) {
        _mm256_storeu_ps(p, a.low);
        _mm256_storeu_ps(p + 8, a.high);
    }
    static F set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
    static F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
    static F add(F a, F b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
    static F sub(F a, F b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
    static F mul(F a, F b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
    static F div(F a, F b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
    static F fma(F a, F b, F c) {
        return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
    }
    static F max(F a, F b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
    static F min(F a, F b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
    static F abs(F a) {
        const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
        return {_mm256_and_ps(a.low, magnitude), _mm256_and_ps(a.high, magnitude)};
    }
    static float reduce_add(F a) {
        const __m256 h = _mm256_add_ps(a.low, a.high);
        __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
        q = _mm_add_ps(q, _mm_movehl_ps(q, q));
        return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
    }
    static float reduce_max(F a) {
        const __m256 h = _mm256_max_ps(a.low, a.high);
        __m128 q = _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
        q = _mm_max_ps(q, _mm_movehl_ps(q, q));
        return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
    }
    static F blend(int n, F first, F rest) {
        const __m256i count = _mm256_set1_epi32(n);
        const __m256i low = _mm256_cmpgt_epi32(count, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
        const __m256i high = _mm256_cmpgt_epi32(count, _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15));
        return {_mm256_blendv_ps(rest.low, first.low, _mm256_castsi256_ps(low)),
                _mm256_blendv_ps(rest.high, first.high, _mm256_castsi256_ps(high))};
    }
    template <int distance> static F swap(F a) {
        if constexpr (distance == 8) return {a.high, a.low};
        else return {swap_in_register<distance>(a.low), swap_in_register<distance>(a.high)};
    }
    static F load_f16(const uint16_t* p) { return {_mm256_cvtph_ps(load_128(p)), _mm256_cvtph_ps(load_128(p + 8))}; }
    static void store_f16(uint16_t* p, F a) {
        constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.low, nearest));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(a.high, nearest));
    }

    static I zero_i() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
    static I set1_i(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
    static I load_i(const int32_t* p) { return {load_256(p), load_256(p + 8)}; }
    static void store_i(int32_t* p, I a) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.low);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), a.high);
    }
    static I load_i8(const int8_t* p) {
        const __m128i bytes = load_128(p);
        return {_mm256_cvtepi8_epi32(bytes), _mm256_cvtepi8_epi32(_mm_unpackhi_epi64(bytes, bytes))};
    }
    static I load_i16(const int16_t* p) {
        return {_mm256_cvtepi16_epi32(load_128(p)), _mm256_cvtepi16_epi32(load_128(p + 8))};
    }
    static void store_i8(int8_t* p, I a) {
        const __m256i byte = _mm256_set1_epi32(255);  // packing saturates: only low bytes may go in
        const __m256i pairs = _mm256_packus_epi32(_mm256_and_si256(a.low, byte), _mm256_and_si256(a.high, byte));
        const __m256i words = _mm256_permute4x64_epi64(pairs, 0xd8);
        const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
    }
    static I add_i(I a, I b) { return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)}; }
    static I sub_i(I a, I b) { return {_mm256_sub_epi32(a.low, b.low), _mm256_sub_epi32(a.high, b.high)}; }
    static I mul_i(I a, I b) { return {_mm256_mullo_epi32(a.low, b.low), _mm256_mullo_epi32(a.high, b.high)}; }
    template <int n> static I shift_left(I a) { return {_mm256_slli_epi32(a.low, n), _mm256_slli_epi32(a.high, n)}; }
    template <int n> static I shift_right(I a) { return {_mm256_srai_epi32(a.low, n), _mm256_srai_epi32(a.high, n)}; }
    static int32_t reduce_add_i(I a) {
        const __m256i h = _mm256_add_epi32(a.low, a.high);
        __m128i q = _mm_add_epi32(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
        q = _mm_add_epi32(q, _mm_shuffle_epi32(q, 0x4e));
        return _mm_cvtsi128_si32(_mm_add_epi32(q, _mm_shuffle_epi32(q, 0xb1)));
    }
    static F to_float(I a) { return {_mm256_cvtepi32_ps(a.low), _mm256_cvtepi32_ps(a.high)}; }
    static I round(F a) { return {_mm256_cvtps_epi32(a.low), _mm256_cvtps_epi32(a.high)}; }
    static F as_float(I a) { return {_mm256_castsi256_ps(a.low), _mm256_castsi256_ps(a.high)}; }
    static I as_int(F a) { return {_mm256_castps_si256(a.low), _mm256_castps_si256(a.high)}; }

    static B load_bytes(const uint8_t* p) { return {load_256(p), load_256(p + 32)}; }
    template <int n, int width> static B field(B a) {
        const __m256i mask = _mm256_set1_epi8((1 << width) - 1);
        return {_mm256_and_si256(_mm256_srli_epi16(a.low, n), mask), _mm256_and_si256(_mm256_srli_epi16(a.high, n), mask)};
    }
    // Bytes 0 and 2, then 1 and 3 of every lane as 16-bit numbers: products of bytes can overflow in pairs.
    static I dot(I acc, B weights, const int8_t* x) {
        const __m256i four = four_bytes(x);
        const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(four, 8), 8), odd = _mm256_srai_epi16(four, 8);
        return {dot_wide(acc.low, weights.low, even, odd), dot_wide(acc.high, weights.high, even, odd)};
    }
    static I dot_small(I acc, B weights, const int8_t* x) {
        const __m256i four = four_bytes(x), ones = _mm256_set1_epi16(1);
        const __m256i low = _mm256_maddubs_epi16(weights.low, four), high = _mm256_maddubs_epi16(weights.high, four);
        return {_mm256_add_epi32(acc.low, _mm256_madd_epi16(low, ones)),
                _mm256_add_epi32(acc.high, _mm256_madd_epi16(high, ones))};
    }

protected:
    static __m256i four_bytes(const int8_t* x) {
        int32_t four;
        std::memcpy(&four, x, 4);
        return _mm256_set1_epi32(four);
    }

private:
    template <class T> static __m128i load_128(const T* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
    template <class T> static __m256i load_256(const T* p) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    }
    template <int distance> static __m256 swap_in_register(__m256 a) {
        if constexpr (distance == 1) return _mm256_permute_ps(a, 0xb1);
        else if constexpr (distance == 2) return _mm256_permute_ps(a, 0x4e);
        else return _mm256_permute2f128_ps(a, a, 1);
    }
    static __m256i dot_wide(__m256i acc, __m256i weights, __m256i even, __m256i odd) {
        const __m256i low = _mm256_madd_epi16(_mm256_and_si256(weights, _mm256_set1_epi16(255)), even);
        const __m256i high = _mm256_madd_epi16(_mm256_srli_epi16(weights, 8), odd);
        return _mm256_add_epi32(acc, _mm256_add_epi32(low, high));
    }
};

}  // namespace qerve
