// Sixteen lanes in four NEON registers, with the 8-bit dot product; see simd_portable.h for the meaning of every operation.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

namespace qerve {

struct SimdNeon {
    static constexpr int kTileRows = 6;
    static constexpr int kAccumulators = 6;

    struct F { float32x4_t v[4]; };
    struct I { int32x4_t v[4]; };
    struct B { uint8x16_t v[4]; };

    static F load(const float* p) { return {{vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}}; }
    static void store(float* p, F a) { for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, a.v[i]); }
    static F set1(float x) { const float32x4_t v = vdupq_n_f32(x); return {{v, v, v, v}}; }
    static F zero() { return set1(0.0f); }
    static F add(F a, F b) { for (int i = 0; i < 4; ++i) a.v[i] = vaddq_f32(a.v[i], b.v[i]); return a; }
    static F sub(F a, F b) { for (int i = 0; i < 4; ++i) a.v[i] = vsubq_f32(a.v[i], b.v[i]); return a; }
    static F mul(F a, F b) { for (int i = 0; i < 4; ++i) a.v[i] = vmulq_f32(a.v[i], b.v[i]); return a; }
    static F div(F a, F b) { for (int i = 0; i < 4; ++i) a.v[i] = vdivq_f32(a.v[i], b.v[i]); return a; }
    static F fma(F a, F b, F c) { for (int i = 0; i < 4; ++i) c.v[i] = vfmaq_f32(c.v[i], a.v[i], b.v[i]); return c; }
    // By comparison: vmaxq and vminq pass NaN on from either side, and order zeros by their signs.
    static F max(F a, F b) { for (int i = 0; i < 4; ++i) a.v[i] = larger(a.v[i], b.v[i]); return a; }
    static F min(F a, F b) {
        for (int i = 0; i < 4; ++i) a.v[i] = vbslq_f32(vcltq_f32(a.v[i], b.v[i]), a.v[i], b.v[i]);
        return a;
    }
    static F abs(F a) { for (float32x4_t& v : a.v) v = vabsq_f32(v); return a; }
    static float reduce_add(F a) {
        const float32x4_t q = vaddq_f32(vaddq_f32(a.v[0], a.v[2]), vaddq_f32(a.v[1], a.v[3]));
        const float32x2_t pair = vadd_f32(vget_low_f32(q), vget_high_f32(q));
        return vget_lane_f32(pair, 0) + vget_lane_f32(pair, 1);
    }
    static float reduce_max(F a) {
        const float32x4_t q = larger(larger(a.v[0], a.v[2]), larger(a.v[1], a.v[3]));
        const float32x4_t pair = larger(q, vextq_f32(q, q, 2));
        return vgetq_lane_f32(larger(pair, vextq_f32(pair, pair, 1)), 0);
    }
    static F blend(int n, F first, F rest) {
        const int32_t numbers[4] = {0, 1, 2, 3};
        for (int i = 0; i < 4; ++i) {
            const uint32x4_t is_first = vcgtq_s32(vdupq_n_s32(n), vaddq_s32(vld1q_s32(numbers), vdupq_n_s32(4 * i)));
            rest.v[i] = vbslq_f32(is_first, first.v[i], rest.v[i]);
        }
        return rest;
    }
    template <int distance> static F swap(F a) {
        if constexpr (distance == 8) return {{a.v[2], a.v[3], a.v[0], a.v[1]}};
        else if constexpr (distance == 4) return {{a.v[1], a.v[0], a.v[3], a.v[2]}};
        else if constexpr (distance == 2) for (float32x4_t& v : a.v) v = vextq_f32(v, v, 2);
        else for (float32x4_t& v : a.v) v = vrev64q_f32(v);
        return a;
    }
    static F load_f16(const uint16_t* p) {
        F r;
        for (int i = 0; i < 4; ++i) r.v[i] = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i)));
        return r;
    }
    static void store_f16(uint16_t* p, F a) {
        for (int i = 0; i < 4; ++i) vst1_u16(p + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(a.v[i])));
    }

    static I zero_i() { return set1_i(0); }
    static I set1_i(int32_t x) { const int32x4_t v = vdupq_n_s32(x); return {{v, v, v, v}}; }
    static I load_i(const int32_t* p) { return {{vld1q_s32(p), vld1q_s32(p + 4), vld1q_s32(p + 8), vld1q_s32(p + 12)}}; }
    static void store_i(int32_t* p, I a) { for (int i = 0; i < 4; ++i) vst1q_s32(p + 4 * i, a.v[i]); }
    static I load_i8(const int8_t* p) {
        const int8x16_t bytes = vld1q_s8(p);
        return widen(vmovl_s8(vget_low_s8(bytes)), vmovl_s8(vget_high_s8(bytes)));
    }
    static I load_i16(const int16_t* p) { return widen(vld1q_s16(p), vld1q_s16(p + 8)); }
    static void store_i8(int8_t* p, I a) {
        const int16x8_t low = vcombine_s16(vmovn_s32(a.v[0]), vmovn_s32(a.v[1]));
        const int16x8_t high = vcombine_s16(vmovn_s32(a.v[2]), vmovn_s32(a.v[3]));
        vst1q_s8(p, vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
    }
    static I add_i(I a, I b) { for (int i = 0; i < 4; ++i) a.v[i] = vaddq_s32(a.v[i], b.v[i]); return a; }
    static I sub_i(I a, I b) { for (int i = 0; i < 4; ++i) a.v[i] = vsubq_s32(a.v[i], b.v[i]); return a; }
    static I mul_i(I a, I b) { for (int i = 0; i < 4; ++i) a.v[i] = vmulq_s32(a.v[i], b.v[i]); return a; }
    template <int n> static I shift_left(I a) { for (int32x4_t& v : a.v) v = vshlq_n_s32(v, n); return a; }
    template <int n> static I shift_right(I a) {
        if constexpr (n > 0) for (int32x4_t& v : a.v) v = vshrq_n_s32(v, n);
        return a;
    }
    static int32_t reduce_add_i(I a) {
        return vaddvq_s32(vaddq_s32(vaddq_s32(a.v[0], a.v[1]), vaddq_s32(a.v[2], a.v[3])));
    }
    static F to_float(I a) { F r; for (int i = 0; i < 4; ++i) r.v[i] = vcvtq_f32_s32(a.v[i]); return r; }
    static I round(F a) { I r; for (int i = 0; i < 4; ++i) r.v[i] = vcvtnq_s32_f32(a.v[i]); return r; }
    static F as_float(I a) { F r; for (int i = 0; i < 4; ++i) r.v[i] = vreinterpretq_f32_s32(a.v[i]); return r; }
    static I as_int(F a) { I r; for (int i = 0; i < 4; ++i) r.v[i] = vreinterpretq_s32_f32(a.v[i]); return r; }

    static B load_bytes(const uint8_t* p) { return {{vld1q_u8(p), vld1q_u8(p + 16), vld1q_u8(p + 32), vld1q_u8(p + 48)}}; }
    template <int n, int width> static B field(B a) {
        for (uint8x16_t& v : a.v) {
            if constexpr (n > 0) v = vshrq_n_u8(v, n);
            v = vandq_u8(v, vdupq_n_u8((1 << width) - 1));
        }
        return a;
    }
    // The instruction multiplies signed bytes: (w - 128) . x, and 128 times the sum of x is taken back.
    static I dot(I acc, B weights, const int8_t* x) {
        const int8x16_t four = four_bytes(x);
        const int32x4_t excess = vdotq_s32(vdupq_n_s32(0), vdupq_n_s8(-128), four);
        for (int i = 0; i < 4; ++i) {
            const int8x16_t centered = vreinterpretq_s8_u8(veorq_u8(weights.v[i], vdupq_n_u8(128)));
            acc.v[i] = vdotq_s32(vsubq_s32(acc.v[i], excess), centered, four);
        }
        return acc;
    }
    static I dot_small(I acc, B weights, const int8_t* x) {
        const int8x16_t four = four_bytes(x);
        for (int i = 0; i < 4; ++i) acc.v[i] = vdotq_s32(acc.v[i], vreinterpretq_s8_u8(weights.v[i]), four);
        return acc;
    }

private:
    static float32x4_t larger(float32x4_t a, float32x4_t b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
    static I widen(int16x8_t low, int16x8_t high) {
        return {{vmovl_s16(vget_low_s16(low)), vmovl_s16(vget_high_s16(low)), vmovl_s16(vget_low_s16(high)),
                 vmovl_s16(vget_high_s16(high))}};
    }
    static int8x16_t four_bytes(const int8_t* x) {
        int32_t four;
        std::memcpy(&four, x, 4);
        return vreinterpretq_s8_s32(vdupq_n_s32(four));
    }
};

}  // namespace qerve
