// Every operation of a `Simd` type on given numbers, laid out for comparison with those of SimdPortable.
// No containers or streams here: what these files are compiled to may only run on the machines they are for.
#pragma once

#include <cstdint>

namespace qerve_test {

struct SimdInputs {
    float a[16], b[16], c[16];
    float to_round[16];  // within int32
    int32_t i[16], j[16];
    uint8_t bytes[64];
    uint8_t small_bytes[64];  // up to 127
    int8_t x[4];
    int8_t i8[16];
    int16_t i16[16];
    uint16_t halves[16];
    int32_t count;
};

struct SimdOutputs {
    static constexpr int kFloats = 22, kInts = 26, kNumbers = 2;
    float floats[kFloats][16];
    int32_t ints[kInts][16];
    float numbers[kNumbers];
    int32_t sum;
    int8_t low_bytes[16];
    uint16_t halves[16];
    int num_floats, num_ints;
};

using SimdOps = void (*)(const SimdInputs& in, SimdOutputs& out);

template <class S>
struct AllSimdOps {
    using F = typename S::F;
    using I = typename S::I;
    using B = typename S::B;

    static void put(SimdOutputs& out, F value) { S::store(out.floats[out.num_floats++], value); }
    static void put(SimdOutputs& out, I value) { S::store_i(out.ints[out.num_ints++], value); }
    // Its bytes as what four unit vectors pick.
    static void put_bytes(SimdOutputs& out, B value) {
        I packed = S::zero_i();
        for (int j = 3; j >= 0; --j) {
            int8_t unit[4] = {0, 0, 0, 0};
            unit[j] = 1;
            packed = S::add_i(S::template shift_left<8>(packed), S::dot(S::zero_i(), value, unit));
        }
        put(out, packed);
    }

    static void run(const SimdInputs& in, SimdOutputs& out) {
        out.num_floats = out.num_ints = 0;
        const F a = S::load(in.a), b = S::load(in.b), c = S::load(in.c);
        put(out, S::set1(in.a[3]));
        put(out, S::zero());
        put(out, S::add(a, b));
        put(out, S::sub(a, b));
        put(out, S::mul(a, b));
        put(out, S::div(a, b));
        put(out, S::fma(a, b, c));
        put(out, S::max(a, b));
        put(out, S::min(a, b));
        put(out, S::abs(a));
        put(out, S::blend(in.count, a, b));
        put(out, S::template swap<1>(a));
        put(out, S::template swap<2>(a));
        put(out, S::template swap<4>(a));
        put(out, S::template swap<8>(a));
        put(out, S::load_f16(in.halves));
        S::store_f16(out.halves, a);
        out.numbers[0] = S::reduce_add(a);
        out.numbers[1] = S::reduce_max(a);

        const I i = S::load_i(in.i), j = S::load_i(in.j);
        put(out, S::zero_i());
        put(out, S::set1_i(in.i[5]));
        put(out, S::load_i8(in.i8));
        put(out, S::load_i16(in.i16));
        put(out, S::add_i(i, j));
        put(out, S::sub_i(i, j));
        put(out, S::mul_i(i, j));
        put(out, S::template shift_left<8>(i));
        put(out, S::template shift_left<23>(i));
        put(out, S::template shift_right<1>(i));
        put(out, S::template shift_right<8>(i));
        put(out, S::round(S::load(in.to_round)));
        put(out, S::as_int(a));
        put(out, S::to_float(i));
        put(out, S::as_float(i));
        out.sum = S::reduce_add_i(i);
        S::store_i8(out.low_bytes, i);

        const B bytes = S::load_bytes(in.bytes);
        put_bytes(out, bytes);
        put_bytes(out, S::template field<0, 4>(bytes));
        put_bytes(out, S::template field<4, 4>(bytes));
        put_bytes(out, S::template field<0, 2>(bytes));
        put_bytes(out, S::template field<2, 2>(bytes));
        put_bytes(out, S::template field<4, 2>(bytes));
        put_bytes(out, S::template field<6, 2>(bytes));
        put(out, S::dot(i, bytes, in.x));
        put(out, S::dot_small(i, S::load_bytes(in.small_bytes), in.x));
    }
};

void portable_simd_ops(const SimdInputs& in, SimdOutputs& out);
void avx2_simd_ops(const SimdInputs& in, SimdOutputs& out);
void avxvnni_simd_ops(const SimdInputs& in, SimdOutputs& out);
void avx512_simd_ops(const SimdInputs& in, SimdOutputs& out);
void neon_simd_ops(const SimdInputs& in, SimdOutputs& out);

}  // namespace qerve_test
