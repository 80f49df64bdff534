// Exponentials over sixteen lanes, from additions and multiplications only: the same bits in every instruction set.
#pragma once

#include <cstdint>

namespace qerve {

template <class Simd>
struct Functions {
    using F = typename Simd::F;
    using I = typename Simd::I;

    // Added to |x| < 2**22 it leaves the nearest integer, halves to even, in the low bits of the sum.
    static constexpr float kRounder = 12582912.0f;  // 1.5 * 2**23
    static constexpr int32_t kRounderBits = 0x4b400000;

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

    // 2**n for integers -127..127, and zero for -127
    static F power_of_two(I n) {
        return Simd::as_float(Simd::template shift_left<23>(Simd::add_i(n, Simd::set1_i(127))));
    }

    // 2**x for x <= 0: exactly 1 at 0 and exactly 0 below -126.5, NaN of NaN
    static F exp2_negative(F x) {
        x = Simd::max(Simd::set1(-127.0f), x);  // in this order NaN passes
        const F rounded = Simd::add(x, Simd::set1(kRounder));
        const F r = Simd::sub(x, Simd::sub(rounded, Simd::set1(kRounder)));
        // The shift in power_of_two drops what else the bits of the sum hold.
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
        const I integer = Simd::sub_i(Simd::as_int(rounded), Simd::set1_i(kRounderBits));
        const I half = Simd::template shift_right<1>(integer);
        const F partial = Simd::mul(exp2_fraction(r), power_of_two(half));
        const F exponential = Simd::mul(partial, power_of_two(Simd::sub_i(integer, half)));
        return Simd::div(x, Simd::add(Simd::set1(1.0f), exponential));
    }
};

}  // namespace qerve
