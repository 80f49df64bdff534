// The grids that rows of activations are rounded to, and the rounding: models/quant/activation.py code for code.
//
// Not-a-number and infinity are no numbers to round. `Poison` collects them at the cost of one fma a vector; whoever
// rounds a poisoned row makes its scales NaN, so that everything computed from it is NaN and the engine sees it.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "kernels.h"

namespace qerve {

// Codes low..high in steps of `scale`. Zero is code 0, also on asymmetric grids: the zero point is part of the range.
struct Grid {
    float scale;
    float low;
    float high;
};

template <class Simd>
struct Grids {
    using F = typename Simd::F;
    using I = typename Simd::I;

    // The largest 16-bit code: 127 * 256, whose high byte is 127 and low byte 0.
    static constexpr float kLargest16 = 32512.0f;

    // Zero times x stays zero unless x is infinite or NaN.
    static F poison(F x, F so_far) { return Simd::fma(x, Simd::zero(), so_far); }
    static bool is_poisoned(F poison) { return !(Simd::reduce_add(poison) == 0.0f); }

    // The grid of n values, n a multiple of 16. Infinities and NaN in x make a grid without meaning, not a NaN.
    static Grid choose(const qerve_activation& activation, const float* x, int64_t n, F& poisoned) {
        switch (activation.kind) {
            case QERVE_ACTIVATION_8: return symmetric(absmax(x, n, poisoned), 127.0f);
            case QERVE_ACTIVATION_16: return symmetric(absmax(x, n, poisoned), kLargest16);
            case QERVE_ACTIVATION_MXINT: return block_floating(activation, absmax(x, n, poisoned));
            default: break;
        }
        if (!activation.is_symmetric) return asymmetric(activation, x, n, poisoned);
        const float largest = static_cast<float>((1 << (activation.num_bits - 1)) - 1);
        return symmetric(absmax(x, n, poisoned) * activation.clip_ratio, largest);
    }

    // A grid in registers.
    struct Rounder {
        explicit Rounder(const Grid& grid)
            : scale(Simd::set1(grid.scale)), minus_scale(Simd::set1(-grid.scale)), inverse(Simd::set1(1.0f / grid.scale)),
              low(Simd::set1(grid.low)), high(Simd::set1(grid.high)),
              is_ordinary(grid.scale > 1e-25f && grid.scale < 1e25f) {}

        // The codes of sixteen values. Bounded before the conversion: no float here is beyond int32.
        I round(F x) const { return Simd::round(Simd::min(Simd::max(divide(x), low), high)); }

        F scale, minus_scale, inverse, low, high;
        bool is_ordinary;

    private:
        // x / scale, correctly rounded, in a sixth of a division's time: two corrections by the exact remainder
        // (Markstein, IBM Journal of Research and Development 34, 1990), which must not underflow.
        F divide(F x) const {
            if (!is_ordinary) return Simd::div(x, scale);
            F quotient = Simd::mul(x, inverse);
            quotient = Simd::fma(Simd::fma(quotient, minus_scale, x), inverse, quotient);
            return Simd::fma(Simd::fma(quotient, minus_scale, x), inverse, quotient);
        }
    };

private:
    static float absmax(const float* x, int64_t n, F& poisoned) {
        F largest = Simd::zero();
        for (int64_t i = 0; i < n; i += kLanes) {
            const F v = Simd::load(x + i);
            largest = Simd::max(Simd::abs(v), largest);  // in this order NaN is dropped
            poisoned = poison(v, poisoned);
        }
        return Simd::reduce_max(largest);
    }

    static float at_least_tiny(float scale) { return scale > FLT_MIN ? scale : FLT_MIN; }

    static Grid symmetric(float absmax, float largest) {
        return {at_least_tiny(absmax / largest), -largest, largest};
    }

    static Grid asymmetric(const qerve_activation& activation, const float* x, int64_t n, F& poisoned) {
        F lowest = Simd::zero(), highest = Simd::zero();  // zero lies between them
        for (int64_t i = 0; i < n; i += kLanes) {
            const F v = Simd::load(x + i);
            lowest = Simd::min(v, lowest);
            highest = Simd::max(v, highest);
            poisoned = poison(v, poisoned);
        }
        const float max_code = static_cast<float>((1 << activation.num_bits) - 1);
        const float low = -Simd::reduce_max(Simd::sub(Simd::zero(), lowest)) * activation.clip_ratio;
        const float high = Simd::reduce_max(highest) * activation.clip_ratio;
        // Divided before the difference is taken, which could overflow.
        const float scale = at_least_tiny(high / max_code - low / max_code);
        const float first = std::nearbyint(low / scale);
        const float bounded = first > -max_code ? first : -max_code;
        return {scale, bounded, bounded + max_code};
    }

    static Grid block_floating(const qerve_activation& activation, float absmax) {
        const float largest = static_cast<float>((1 << (activation.num_bits - 1)) - 1);
        if (absmax == 0.0f) return {1.0f, -largest, largest};
        uint32_t bits;
        std::memcpy(&bits, &absmax, 4);
        // absmax lies in 2**exponent .. 2**(exponent + 1); subnormal ones end at the clamp whatever they are.
        int exponent = static_cast<int>(bits >> 23) - 127 - (activation.num_bits - 2);
        if (activation.is_ceil && (bits & 0x7fffffu) == 0) --exponent;
        exponent = exponent < -126 ? -126 : exponent > 127 ? 127 : exponent;
        bits = static_cast<uint32_t>(exponent + 127) << 23;
        float scale;
        std::memcpy(&scale, &bits, 4);
        return {scale, -largest, largest};
    }
};

}  // namespace qerve
