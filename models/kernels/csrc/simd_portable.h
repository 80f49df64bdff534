// Sixteen lanes in plain C++: the meaning of every operation, and what runs where nothing better does.
// simd_avx512.h, simd_avx2.h and simd_neon.h offer the same names with the same results, bit for bit.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace qerve {

struct SimdPortable {
    // Of the register tiles: float variables that fit next to their operands, and query rows of attention.
    static constexpr int kAccumulators = 6;
    static constexpr int kTileRows = 2;

    struct F { float v[16]; };      // 16 floats
    struct I { int32_t v[16]; };    // 16 integers
    struct B { uint8_t v[64]; };    // 16 lanes of 4 bytes

    // -- floats
    static F load(const float* p) { F r; std::memcpy(r.v, p, 64); return r; }
    static void store(float* p, F a) { std::memcpy(p, a.v, 64); }
    static F set1(float x) { F r; for (float& v : r.v) v = x; return r; }
    static F zero() { return set1(0.0f); }
    static F add(F a, F b) { for (int i = 0; i < 16; ++i) a.v[i] += b.v[i]; return a; }
    static F sub(F a, F b) { for (int i = 0; i < 16; ++i) a.v[i] -= b.v[i]; return a; }
    static F mul(F a, F b) { for (int i = 0; i < 16; ++i) a.v[i] *= b.v[i]; return a; }
    static F div(F a, F b) { for (int i = 0; i < 16; ++i) a.v[i] /= b.v[i]; return a; }
    // a * b + c, rounded once
    static F fma(F a, F b, F c) { for (int i = 0; i < 16; ++i) c.v[i] = std::fma(a.v[i], b.v[i], c.v[i]); return c; }
    static F max(F a, F b) { for (int i = 0; i < 16; ++i) a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i]; return a; }
    static F min(F a, F b) { for (int i = 0; i < 16; ++i) a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i]; return a; }
    static F abs(F a) { for (float& v : a.v) v = std::fabs(v); return a; }
    // halves, quarters, eighths, sixteenths: ((0+8)+(4+12)) + ... in this order everywhere
    static float reduce_add(F a) {
        for (int half = 8; half > 0; half /= 2) for (int i = 0; i < half; ++i) a.v[i] += a.v[i + half];
        return a.v[0];
    }
    static float reduce_max(F a) {
        for (int half = 8; half > 0; half /= 2)
            for (int i = 0; i < half; ++i) a.v[i] = a.v[i] > a.v[i + half] ? a.v[i] : a.v[i + half];
        return a.v[0];
    }
    // lanes below n of `first`, the others of `rest`; any n
    static F blend(int n, F first, F rest) { for (int i = 0; i < 16 && i < n; ++i) rest.v[i] = first.v[i]; return rest; }
    // lane i becomes lane i ^ distance, for 1, 2, 4 and 8
    template <int distance> static F swap(F a) { F r; for (int i = 0; i < 16; ++i) r.v[i] = a.v[i ^ distance]; return r; }
    static F load_f16(const uint16_t* p) { F r; for (int i = 0; i < 16; ++i) r.v[i] = half_to_float(p[i]); return r; }
    static void store_f16(uint16_t* p, F a) { for (int i = 0; i < 16; ++i) p[i] = float_to_half(a.v[i]); }

    // -- integers
    static I zero_i() { I r{}; return r; }
    static I set1_i(int32_t x) { I r; for (int32_t& v : r.v) v = x; return r; }
    static I load_i(const int32_t* p) { I r; std::memcpy(r.v, p, 64); return r; }
    static void store_i(int32_t* p, I a) { std::memcpy(p, a.v, 64); }
    static I load_i8(const int8_t* p) { I r; for (int i = 0; i < 16; ++i) r.v[i] = p[i]; return r; }
    static I load_i16(const int16_t* p) { I r; for (int i = 0; i < 16; ++i) r.v[i] = p[i]; return r; }
    static void store_i8(int8_t* p, I a) { for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(a.v[i]); }  // low bytes
    // the low 32 bits of sum, difference and product
    static I add_i(I a, I b) { for (int i = 0; i < 16; ++i) a.v[i] = wrap(bits(a.v[i]) + bits(b.v[i])); return a; }
    static I sub_i(I a, I b) { for (int i = 0; i < 16; ++i) a.v[i] = wrap(bits(a.v[i]) - bits(b.v[i])); return a; }
    static I mul_i(I a, I b) { for (int i = 0; i < 16; ++i) a.v[i] = wrap(bits(a.v[i]) * bits(b.v[i])); return a; }
    template <int n> static I shift_left(I a) {
        for (int32_t& v : a.v) v = wrap(bits(v) << n);
        return a;
    }
    template <int n> static I shift_right(I a) { for (int32_t& v : a.v) v >>= n; return a; }  // arithmetic
    static int32_t reduce_add_i(I a) { uint32_t s = 0; for (int32_t v : a.v) s += bits(v); return wrap(s); }
    static F to_float(I a) { F r; for (int i = 0; i < 16; ++i) r.v[i] = static_cast<float>(a.v[i]); return r; }
    // to the nearest, halves to even; values beyond int32 and NaN are undefined
    static I round(F a) { I r; for (int i = 0; i < 16; ++i) r.v[i] = static_cast<int32_t>(std::nearbyint(a.v[i])); return r; }
    static F as_float(I a) { F r; std::memcpy(r.v, a.v, 64); return r; }
    static I as_int(F a) { I r; std::memcpy(r.v, a.v, 64); return r; }

    // -- bytes
    static B load_bytes(const uint8_t* p) { B r; std::memcpy(r.v, p, 64); return r; }
    // bits n..n + width of every byte
    template <int n, int width> static B field(B a) {
        for (uint8_t& v : a.v) v = static_cast<uint8_t>((v >> n) & ((1 << width) - 1));
        return a;
    }
    // acc[lane] += sum of weights[4 lane + j] * x[j], weights unsigned, x the same four signed bytes for all lanes; exact
    static I dot(I acc, B weights, const int8_t* x) {
        for (int i = 0; i < 16; ++i)
            for (int j = 0; j < 4; ++j) acc.v[i] += static_cast<int32_t>(weights.v[4 * i + j]) * x[j];
        return acc;
    }

    // the same, for weights up to 127 only: fewer instructions on some machines
    static I dot_small(I acc, B weights, const int8_t* x) { return dot(acc, weights, x); }

    static uint32_t bits(int32_t x) { return static_cast<uint32_t>(x); }
    static int32_t wrap(uint32_t x) { return static_cast<int32_t>(x); }

    static float half_to_float(uint16_t h) {
        const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
        const uint32_t exponent = (h >> 10) & 31u;
        const uint32_t mantissa = h & 1023u;
        if (exponent == 0) {
            const float tiny = static_cast<float>(mantissa) * 5.9604644775390625e-8f;  // 2**-24
            return sign ? -tiny : tiny;
        }
        const uint32_t bits = sign | (exponent == 31 ? 0x7f800000u | (mantissa << 13) : ((exponent + 112u) << 23) | (mantissa << 13));
        float r;
        std::memcpy(&r, &bits, 4);
        return r;
    }
    static uint16_t float_to_half(float x) {
        uint32_t bits;
        std::memcpy(&bits, &x, 4);
        const uint32_t sign = (bits >> 16) & 0x8000u;
        bits &= 0x7fffffffu;
        if (bits >= 0x7f800000u) return static_cast<uint16_t>(sign | 0x7c00u | (bits > 0x7f800000u ? 0x200u | ((bits >> 13) & 0x3ffu) : 0u));
        if (bits >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds to infinity
        if (bits < 0x38800000u) {  // subnormal: the float adder rounds
            float magnitude;
            std::memcpy(&magnitude, &bits, 4);
            const float shifted = magnitude + 0.5f;  // 0.5 has its last bit at 2**-24
            uint32_t result;
            std::memcpy(&result, &shifted, 4);
            return static_cast<uint16_t>(sign | (result - 0x3f000000u));
        }
        const uint32_t odd = (bits >> 13) & 1u;
        return static_cast<uint16_t>(sign | ((bits - 0x38000000u + 0xfffu + odd) >> 13));
    }
};

}  // namespace qerve
