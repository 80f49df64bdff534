// The operations of every instruction set against those in plain C++, bit for bit.
#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "kernels_here.h"
#include "simd_ops.h"
#include "simd_portable.h"

using namespace qerve_test;

void qerve_test::portable_simd_ops(const SimdInputs& in, SimdOutputs& out) {
    AllSimdOps<qerve::SimdPortable>::run(in, out);
}

namespace {

SimdOps ops_of(qerve::Isa isa) {
    switch (isa) {
#ifdef QERVE_HAS_AVX2
        case qerve::Isa::avx2: return avx2_simd_ops;
#endif
#ifdef QERVE_HAS_AVXVNNI
        case qerve::Isa::avx_vnni: return avxvnni_simd_ops;
#endif
#ifdef QERVE_HAS_AVX512
        case qerve::Isa::avx512_vnni: return avx512_simd_ops;
#endif
#ifdef QERVE_HAS_NEON
        case qerve::Isa::neon_dotprod: return neon_simd_ops;
#endif
        default: return portable_simd_ops;
    }
}

float any_float(std::mt19937& random) {
    const uint32_t kind = random() % 16;
    const float specials[] = {0.0f, -0.0f, std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity(),
                              std::nanf(""), 65504.0f, 65519.9f, 65520.0f, 5.9604645e-8f, 2.9802322e-8f, 1e-40f,
                              -std::numeric_limits<float>::max(), std::numeric_limits<float>::min(), 1.0009766f, 1.0004883f};
    if (kind == 0) return specials[random() % (sizeof(specials) / sizeof(specials[0]))];
    if (kind < 4) {  // any bits
        const auto bits = static_cast<uint32_t>(random());
        float x;
        std::memcpy(&x, &bits, 4);
        return x;
    }
    const float mantissa = std::uniform_real_distribution<float>(-2.0f, 2.0f)(random);
    return std::ldexp(mantissa, static_cast<int>(random() % 40) - 24);
}

SimdInputs any_inputs(std::mt19937& random) {
    SimdInputs in;
    for (int i = 0; i < 16; ++i) {
        in.a[i] = any_float(random);
        in.b[i] = any_float(random);
        in.c[i] = any_float(random);
        in.to_round[i] = random() % 2 ? static_cast<float>(static_cast<int>(random() % 41) - 20) / 2
                                      : std::uniform_real_distribution<float>(-2e9f, 2e9f)(random);
        in.i[i] = static_cast<int32_t>(random() >> (random() % 32));
        in.j[i] = static_cast<int32_t>(random());
        in.i8[i] = static_cast<int8_t>(random());
        in.i16[i] = static_cast<int16_t>(random());
        in.halves[i] = static_cast<uint16_t>(random());
    }
    const bool is_extreme = random() % 4 == 0;
    for (int i = 0; i < 64; ++i) {
        in.bytes[i] = is_extreme ? 255 : static_cast<uint8_t>(random());
        in.small_bytes[i] = is_extreme ? 127 : static_cast<uint8_t>(random() % 128);
    }
    for (int8_t& x : in.x) x = is_extreme ? static_cast<int8_t>(random() % 2 ? -128 : 127) : static_cast<int8_t>(random());
    in.count = static_cast<int32_t>(random() % 23) - 3;
    return in;
}

// NaN compares as NaN, whatever its bits.
bool is_same(float a, float b) { return std::memcmp(&a, &b, 4) == 0 || (std::isnan(a) && std::isnan(b)); }

bool is_same_half(uint16_t a, uint16_t b) {
    return a == b || ((a & 0x7fff) > 0x7c00 && (b & 0x7fff) > 0x7c00);
}

void compare(const char* name, const SimdOutputs& a, const SimdOutputs& b) {
    const auto check = [name](bool holds, const char* what, int number, int lane) {
        std::ostringstream where;
        where << name << ": " << what << " result " << number << ", lane " << lane;
        if (!holds) CHECK_EQUAL(where.str(), "the portable one");
    };
    CHECK_EQUAL(a.num_floats, b.num_floats);
    CHECK_EQUAL(a.num_ints, b.num_ints);
    for (int lane = 0; lane < 16; ++lane) {
        for (int k = 0; k < a.num_floats; ++k) check(is_same(a.floats[k][lane], b.floats[k][lane]), "float", k, lane);
        for (int k = 0; k < a.num_ints; ++k) {
            // Bits of NaN again, in as_int.
            float x, y;
            std::memcpy(&x, &a.ints[k][lane], 4);
            std::memcpy(&y, &b.ints[k][lane], 4);
            check(a.ints[k][lane] == b.ints[k][lane], "integer", k, lane);
        }
        check(is_same_half(a.halves[lane], b.halves[lane]), "float16", 0, lane);
        check(a.low_bytes[lane] == b.low_bytes[lane], "byte", 0, lane);
    }
    for (int k = 0; k < SimdOutputs::kNumbers; ++k) check(is_same(a.numbers[k], b.numbers[k]), "reduced", k, 0);
    check(a.sum == b.sum, "sum", 0, 0);
}

}  // namespace

QERVE_TEST(every_instruction_set_computes_what_plain_code_does) {
    std::mt19937 random(5);
    for (int round = 0; round < 3000; ++round) {
        const SimdInputs in = any_inputs(random);
        SimdOutputs expected;
        portable_simd_ops(in, expected);
        for (const qerve::Isa isa : runnable_isas()) {
            SimdOutputs outputs;
            ops_of(isa)(in, outputs);
            compare(qerve::isa_name(isa), outputs, expected);
        }
    }
}

QERVE_TEST(half_precision_goes_there_and_back) {
    for (uint32_t bits = 0; bits < 65536; ++bits) {
        const auto half = static_cast<uint16_t>(bits);
        const float x = qerve::SimdPortable::half_to_float(half);
        const int exponent = (half >> 10) & 31, mantissa = half & 1023;
        if (exponent == 31) {
            CHECK(mantissa ? std::isnan(x) : std::isinf(x));
            continue;
        }
        const double magnitude = exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
        CHECK(static_cast<double>(x) == (half & 0x8000 ? -magnitude : magnitude));
        CHECK_EQUAL(qerve::SimdPortable::float_to_half(x), half);
    }
}

QERVE_TEST(rounding_to_half_precision_takes_the_nearest) {
    std::mt19937 random(6);
    for (int round = 0; round < 100000; ++round) {
        const float x = std::ldexp(std::uniform_real_distribution<float>(-1.0f, 1.0f)(random), static_cast<int>(random() % 42) - 25);
        const uint16_t half = qerve::SimdPortable::float_to_half(x);
        const double distance = std::abs(static_cast<double>(qerve::SimdPortable::half_to_float(half)) - static_cast<double>(x));
        for (const int step : {-1, 1}) {
            const auto neighbour = static_cast<uint16_t>(half + step);
            if ((half & 0x7fff) == 0 && step < 0) continue;
            const double y = static_cast<double>(qerve::SimdPortable::half_to_float(neighbour));
            const double other = std::abs(y - static_cast<double>(x));
            CHECK(std::abs(x) >= 65504.0f || distance < other || (distance == other && half % 2 == 0));
        }
    }
}
