// The instruction set that is chosen, against what processors are documented to report.
#include <cstdlib>
#include <thread>

#include "library_info.h"
#include "test.h"

using namespace qerve;

namespace {

constexpr uint32_t kEverySet = (1u << kNumIsas) - 1;
constexpr uint64_t kSse = 0x03, kAvx = 0x07, kAvx512 = 0xe7, kTiles = 0x60000;

// Bits of CPUID as the manuals number them.
constexpr uint32_t bits() { return 0; }
template <typename... Rest>
constexpr uint32_t bits(int first, Rest... rest) {
    return 1u << first | bits(rest...);
}

X86Words haswell() {
    X86Words words;
    words.leaf1_ecx = bits(12, 27, 28, 29);  // FMA, OSXSAVE, AVX, F16C
    words.leaf7_ebx = bits(3, 5, 8);         // BMI1, AVX2, BMI2
    words.xcr0 = kAvx;
    return words;
}

X86Words alder_lake() {
    X86Words words = haswell();
    words.leaf7_1_eax = bits(4);  // AVX-VNNI
    return words;
}

X86Words cascade_lake() {
    X86Words words = haswell();
    words.leaf7_ebx |= bits(16, 17, 28, 30, 31);  // AVX-512 F, DQ, CD, BW, VL
    words.leaf7_ecx = bits(11);                   // VNNI, but no VBMI
    words.xcr0 = kAvx512;
    return words;
}

X86Words ice_lake() {
    X86Words words = cascade_lake();
    words.leaf7_ecx |= bits(1, 6, 12, 14);  // VBMI, VBMI2, BITALG, VPOPCNTDQ
    return words;
}

X86Words sapphire_rapids() {
    X86Words words = ice_lake();
    words.leaf7_edx = bits(22, 24, 25);  // AMX-BF16, -TILE, -INT8
    words.leaf7_1_eax = bits(4, 5);      // AVX-VNNI, AVX512-BF16
    words.xcr0 = kAvx512 | kTiles;
    return words;
}

std::string best(uint32_t features, uint32_t compiled = kEverySet) {
    const IsaChoice choice = choose_isa(nullptr, compiled, features);
    return choice.isa ? isa_name(*choice.isa) : choice.error;
}

std::string refusal(const char* forced, uint32_t compiled, uint32_t features) {
    const IsaChoice choice = choose_isa(forced, compiled, features);
    CHECK(!choice.isa);
    return choice.error;
}

bool contains(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

}  // namespace

QERVE_TEST(best_set_of_known_processors) {
    CHECK_EQUAL(best(0), "portable");
    CHECK_EQUAL(best(decode_x86(haswell())), "avx2");
    CHECK_EQUAL(best(decode_x86(alder_lake())), "avx-vnni");
    CHECK_EQUAL(best(decode_x86(cascade_lake())), "avx2");
    CHECK_EQUAL(best(decode_x86(ice_lake())), "avx512-vnni");
    CHECK_EQUAL(best(decode_x86(sapphire_rapids()) | kTileState), "amx");
    CHECK_EQUAL(best(kNeonDotprod | kNeonFp16), "neon-dotprod");
    CHECK_EQUAL(best(kNeonDotprod), "portable");
}

QERVE_TEST(tiles_need_the_permission_of_the_system) {
    CHECK_EQUAL(best(decode_x86(sapphire_rapids())), "avx512-vnni");
    CHECK_EQUAL(refusal("amx", kEverySet, decode_x86(sapphire_rapids())),
                "this machine cannot run amx: it lacks the operating system's permission to use tile registers");
}

QERVE_TEST(registers_that_the_system_does_not_save_are_not_used) {
    X86Words words = ice_lake();
    words.xcr0 = kAvx;
    CHECK_EQUAL(best(decode_x86(words)), "avx2");
    words.xcr0 = kSse;
    CHECK_EQUAL(best(decode_x86(words)), "portable");
    words.xcr0 = 0xc7;  // masks not saved
    CHECK_EQUAL(best(decode_x86(words)), "avx2");
}

QERVE_TEST(every_required_feature_counts_and_is_named) {
    const uint32_t all = decode_x86(sapphire_rapids()) | kTileState;
    CHECK_EQUAL(missing_features(Isa::amx, all), "");
    for (uint32_t feature = 1; feature <= kTileState; feature <<= 1) {
        if (feature == kAvxVnni) continue;  // not of this set
        CHECK(!missing_features(Isa::amx, all & ~feature).empty());
    }
    CHECK_EQUAL(missing_features(Isa::avx512_vnni, decode_x86(cascade_lake())), "AVX512_VBMI");
    CHECK_EQUAL(missing_features(Isa::avx512_vnni, all & ~(kAvx512Vnni | kAvx512Dq)), "AVX512DQ, AVX512_VNNI");
}

QERVE_TEST(only_compiled_sets_are_chosen) {
    const uint32_t all = decode_x86(sapphire_rapids()) | kTileState;
    CHECK_EQUAL(best(all, isa_bit(Isa::portable) | isa_bit(Isa::avx2)), "avx2");
    CHECK_EQUAL(best(all, isa_bit(Isa::portable)), "portable");
    CHECK(contains(best(all, 0), "no instruction set"));
    CHECK(contains(refusal("amx", isa_bit(Isa::portable), all), "it holds portable"));
}

QERVE_TEST(forced_set_is_taken_or_refused_with_the_reason) {
    const uint32_t features = decode_x86(ice_lake());
    for (const char* name : {"portable", "avx2", "avx512-vnni"}) {
        const IsaChoice choice = choose_isa(name, kEverySet, features);
        CHECK(choice.isa && std::string(isa_name(*choice.isa)) == name);
    }
    CHECK_EQUAL(*choose_isa("", kEverySet, features).isa == Isa::avx512_vnni, true);
    CHECK(contains(refusal("avx-vnni", kEverySet, features), "lacks AVX_VNNI"));
    CHECK(contains(refusal("neon-dotprod", kEverySet, features), "FEAT_DotProd"));
    CHECK(contains(refusal("AVX2", kEverySet, features), "there are amx, avx512-vnni, avx-vnni, avx2, neon-dotprod"));
}

QERVE_TEST(names_lead_back_to_their_sets) {
    for (int i = 0; i < kNumIsas; ++i) {
        const std::optional<Isa> isa = isa_named(isa_name(static_cast<Isa>(i)));
        CHECK(isa && static_cast<int>(*isa) == i);
    }
    CHECK(!isa_named("sse2"));
}

QERVE_TEST(this_machine_answers_without_contradiction) {
    const uint32_t features = detected_features();
    CHECK_EQUAL(features, detected_features());
    CHECK_EQUAL(has_avx2(), missing_features(Isa::avx2, features).empty());
    CHECK(!has_amx_int8() || has_avx512_vnni());
    CHECK(!has_avx512_vnni() || has_avx2());
    CHECK(!has_avx_vnni() || has_avx2());
    CHECK(!(has_avx2() && has_neon_dotprod()));
#if defined(__x86_64__) && defined(__GNUC__)
    // The compiler's own detection, which knows nothing of ours.
    CHECK_EQUAL((features & kAvx2) && (features & kYmmState), __builtin_cpu_supports("avx2") != 0);
    CHECK_EQUAL((features & kAvx512Vnni) && (features & kZmmState), __builtin_cpu_supports("avx512vnni") != 0);
    CHECK_EQUAL((features & kAvx512Vbmi) && (features & kZmmState), __builtin_cpu_supports("avx512vbmi") != 0);
#endif
}

// Set where the machine is known: an emulator.
QERVE_TEST(expected_set_is_the_best_here) {
    const char* expected = std::getenv("QERVE_TEST_BEST_ISA");
    if (expected == nullptr) SKIP("QERVE_TEST_BEST_ISA is not set");
    const uint32_t features = detected_features();
    CHECK_EQUAL(best(features), expected);
}

QERVE_TEST(threads_may_ask_at_the_same_time) {
    std::vector<std::thread> threads;
    const std::string expected = qerve_isa_best();
    for (int i = 0; i < 4; ++i) {
        threads.emplace_back([&expected] {
            for (int repeat = 0; repeat < 20; ++repeat) CHECK_EQUAL(expected, qerve_isa_best());
        });
    }
    for (std::thread& thread : threads) thread.join();
}

QERVE_TEST(c_interface_tells_the_same_and_keeps_to_its_buffers) {
    CHECK_EQUAL(std::string(qerve_isa_best()), isa_name(*choose_isa(nullptr).isa));
    char text[64] = "untouched";
    CHECK_EQUAL(std::string(qerve_isa_choose("portable", text, sizeof(text))), "portable");
    CHECK_EQUAL(std::string(text), "untouched");
    CHECK(qerve_isa_choose("abacus", text, 9) == nullptr);
    CHECK_EQUAL(std::string(text), "there is");
    CHECK(qerve_isa_choose("abacus", nullptr, 0) == nullptr);
    qerve_isa_compiled(text, sizeof(text));
    CHECK_EQUAL(std::string(text), isa_names(compiled_isas()));
}
