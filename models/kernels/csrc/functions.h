// Exponentials over sixteen lanes, from additions and multiplications only: the same bits in every instruction set.
#pragma once

#include <cstdint>

namespace qerve {

template <class Simd>
struct Functions {
    using F = typename Simd::F;
    using I = typename Simd::I;

    // Added to |x| < 2**22 it leaves the nearest integer and 127, the bias of float exponents, in the sum's low bits.
    static constexpr float kRounder = 12582912.0f + 127.0f;  // 1.5 * 2**23 + 127
    static constexpr int32_t kRounderBits = 0x4b400000;      // what else the sum holds

    // 2**r for |r| <= 1/2: the minimax polynomial of degree 6 that is exactly 1 at 0, relative error 2e-8 and rounding
    static F exp2_fraction(F r) {
        F p = Simd::set1(1.5353361959569156e-4f);
        p = Simd::fma(p, r, Simd::set1(1.3398873852565885e-3f));
        p = Simd::fma(p, r, Simd::set1(9.61843691766262e-3f));
        p = Simd::fma(p, r, Simd::set1(5.5503323674201965e-2f));
        p = Simd::fma(p, r, Simd::set1(2.4022647738456726e-1f));
        p = Simd::fma(p, r, Simd::set1(6.931471824645996e-1f));
        return Simd::fma(p, r, Simd::set1(1.0f));
    }

    // 2**(biased - 127), and zero where `biased` is; only its lowest nine bits count
    static F power_of_two(I biased) { return Simd::as_float(Simd::template shift_left<23>(biased)); }

    // 2**x for x <= 0: exactly 1 at 0 and exactly 0 up to -126.5, NaN of NaN
    static F exp2_negative(F x) {
        x = Simd::max(Simd::set1(-127.0f), x);  // in this order NaN passes
        const F rounded = Simd::add(x, Simd::set1(kRounder));
        const F r = Simd::sub(x, Simd::sub(rounded, Simd::set1(kRounder)));
        return Simd::mul(exp2_fraction(r), power_of_two(Simd::as_int(rounded)));
    }

    // x / (1 + exp(-x)), relative error below 3e-7; -0 where exp(-x) overflows
    static F silu(F x) {
        const F log2e = Simd::set1(1.44269502162933349609375f);
        const F log2e_rest = Simd::set1(1.92596299e-8f);
        const F y = Simd::max(Simd::min(Simd::sub(Simd::zero(), x), Simd::set1(89.0f)), Simd::set1(-64.0f));
        const F rounded = Simd::fma(y, log2e, Simd::set1(kRounder));
        const F n = Simd::sub(rounded, Simd::set1(kRounder));
        const F r = Simd::fma(y, log2e_rest, Simd::fma(y, log2e, Simd::sub(Simd::zero(), n)));
        // 2**128 is no float: in two factors the product becomes infinite by itself.
        const I twice_biased = Simd::sub_i(Simd::as_int(rounded), Simd::set1_i(kRounderBits - 127));
        const I half = Simd::template shift_right<1>(twice_biased);
        const I rest = Simd::sub_i(twice_biased, half);
        const F exponential = Simd::mul(Simd::mul(exp2_fraction(r), power_of_two(half)), power_of_two(rest));
        return Simd::div(x, Simd::add(Simd::set1(1.0f), exponential));
    }
};

}  // namespace qerve
