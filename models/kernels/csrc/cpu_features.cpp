// Detection of instruction sets, and the choice of one. Compiled without any: it runs before anything is known.
#include "cpu_features.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__linux__) && defined(__aarch64__)
#include <sys/auxv.h>
#endif
#if defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace qerve {

namespace {

constexpr uint32_t kNeedsAvx2 = kAvx2 | kFma | kF16c | kYmmState;
constexpr uint32_t kNeedsAvx512 = kNeedsAvx2 | kBmi2 | kAvx512F | kAvx512Bw | kAvx512Vl | kAvx512Dq | kAvx512Vnni |
                                  kAvx512Vbmi | kZmmState;

struct IsaFacts {
    const char* name;
    uint32_t required;  // what the compiler flags of its translation unit allow, which CMakeLists.txt lists
};

constexpr IsaFacts kIsas[kNumIsas] = {
    {"portable", 0},
    {"neon-dotprod", kNeonDotprod | kNeonFp16},
    {"avx2", kNeedsAvx2},
    {"avx-vnni", kNeedsAvx2 | kAvxVnni},
    {"avx512-vnni", kNeedsAvx512},
    {"amx", kNeedsAvx512 | kAvx512Bf16 | kAmxTile | kAmxInt8 | kAmxBf16 | kTileState},
};

struct FeatureName {
    uint32_t bit;
    const char* name;
};

constexpr FeatureName kFeatureNames[] = {
    {kAvx2, "AVX2"},
    {kFma, "FMA"},
    {kF16c, "F16C"},
    {kBmi2, "BMI2"},
    {kAvxVnni, "AVX_VNNI"},
    {kAvx512F, "AVX512F"},
    {kAvx512Bw, "AVX512BW"},
    {kAvx512Vl, "AVX512VL"},
    {kAvx512Dq, "AVX512DQ"},
    {kAvx512Vnni, "AVX512_VNNI"},
    {kAvx512Vbmi, "AVX512_VBMI"},
    {kAvx512Bf16, "AVX512_BF16"},
    {kAmxTile, "AMX_TILE"},
    {kAmxInt8, "AMX_INT8"},
    {kAmxBf16, "AMX_BF16"},
    {kYmmState, "the operating system's support of 256-bit registers"},
    {kZmmState, "the operating system's support of 512-bit registers"},
    {kTileState, "the operating system's permission to use tile registers"},
    {kNeonDotprod, "dot products (FEAT_DotProd)"},
    {kNeonFp16, "half precision (FEAT_FP16)"},
};

constexpr uint32_t bit(uint32_t word, int position, uint32_t feature) { return (word >> position & 1) ? feature : 0; }

#if defined(__x86_64__)

constexpr uint32_t kOsxsave = 1u << 27;
constexpr uint64_t kXcr0Tiles = 3u << 17;

uint64_t read_xcr0() {
    uint32_t low = 0, high = 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return static_cast<uint64_t>(high) << 32 | low;
}

X86Words read_words() {
    X86Words words;
    uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
    if (__get_cpuid(1, &eax, &ebx, &ecx, &edx)) words.leaf1_ecx = ecx;
    if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) {
        words.leaf7_ebx = ebx;
        words.leaf7_ecx = ecx;
        words.leaf7_edx = edx;
        const uint32_t last_subleaf = eax;
        if (last_subleaf >= 1 && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx)) words.leaf7_1_eax = eax;
    }
    if (words.leaf1_ecx & kOsxsave) words.xcr0 = read_xcr0();
    return words;
}

// Linux hands out the 8 KiB of tile registers only on request, per process and for good.
bool may_use_tiles(const X86Words& words) {
    if ((words.xcr0 & kXcr0Tiles) != kXcr0Tiles) return false;
#if defined(__linux__)
    constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
    constexpr long kTileData = 18;               // XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

#endif

#if defined(__APPLE__)
bool sysctl_flag(const char* name) {
    int32_t value = 0;
    size_t size = sizeof(value);
    return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
}
#endif

bool has(Isa isa) { return missing_features(isa, detected_features()).empty(); }

void append(std::string& list, const char* item) {
    if (!list.empty()) list += ", ";
    list += item;
}

}  // namespace

uint32_t decode_x86(const X86Words& words) {
    uint32_t features = 0;
    features |= bit(words.leaf1_ecx, 12, kFma) | bit(words.leaf1_ecx, 29, kF16c);
    features |= bit(words.leaf7_ebx, 5, kAvx2) | bit(words.leaf7_ebx, 8, kBmi2);
    features |= bit(words.leaf7_ebx, 16, kAvx512F) | bit(words.leaf7_ebx, 17, kAvx512Dq);
    features |= bit(words.leaf7_ebx, 30, kAvx512Bw) | bit(words.leaf7_ebx, 31, kAvx512Vl);
    features |= bit(words.leaf7_ecx, 1, kAvx512Vbmi) | bit(words.leaf7_ecx, 11, kAvx512Vnni);
    features |= bit(words.leaf7_edx, 22, kAmxBf16) | bit(words.leaf7_edx, 24, kAmxTile);
    features |= bit(words.leaf7_edx, 25, kAmxInt8);
    features |= bit(words.leaf7_1_eax, 4, kAvxVnni) | bit(words.leaf7_1_eax, 5, kAvx512Bf16);
    // XCR0: bits 1 and 2 are the lower and upper half of ymm, 5 to 7 the masks, the upper halves of zmm, zmm16 to 31.
    if ((words.xcr0 & 0x06) == 0x06) features |= kYmmState;
    if ((words.xcr0 & 0xe6) == 0xe6) features |= kZmmState;
    return features;
}

uint32_t detected_features() {
    uint32_t features = 0;
#if defined(__x86_64__)
    const X86Words words = read_words();
    features = decode_x86(words);
#if defined(__APPLE__)
    // macOS adds the zmm bits to XCR0 only when a thread first uses these registers.
    if (sysctl_flag("hw.optional.avx512f")) features |= kZmmState;
#endif
    if ((features & kAmxTile) && may_use_tiles(words)) features |= kTileState;
#elif defined(__aarch64__) && defined(__linux__)
    const unsigned long capabilities = getauxval(AT_HWCAP);
    if (capabilities >> 20 & 1) features |= kNeonDotprod;  // HWCAP_ASIMDDP
    if (capabilities >> 10 & 1) features |= kNeonFp16;     // HWCAP_ASIMDHP
#elif defined(__aarch64__) && defined(__APPLE__)
    if (sysctl_flag("hw.optional.arm.FEAT_DotProd")) features |= kNeonDotprod;
    if (sysctl_flag("hw.optional.arm.FEAT_FP16")) features |= kNeonFp16;
#endif
    return features;
}

bool has_avx2() { return has(Isa::avx2); }
bool has_avx_vnni() { return has(Isa::avx_vnni); }
bool has_avx512_vnni() { return has(Isa::avx512_vnni); }
bool has_amx_int8() { return has(Isa::amx); }
bool has_neon_dotprod() { return has(Isa::neon_dotprod); }

const char* isa_name(Isa isa) { return kIsas[static_cast<int>(isa)].name; }

std::optional<Isa> isa_named(const std::string& name) {
    for (int i = 0; i < kNumIsas; ++i) {
        if (name == kIsas[i].name) return static_cast<Isa>(i);
    }
    return std::nullopt;
}

uint32_t compiled_isas() {
    uint32_t isas = isa_bit(Isa::portable);
#if defined(QERVE_HAS_NEON)
    isas |= isa_bit(Isa::neon_dotprod);
#endif
#if defined(QERVE_HAS_AVX2)
    isas |= isa_bit(Isa::avx2);
#endif
#if defined(QERVE_HAS_AVXVNNI)
    isas |= isa_bit(Isa::avx_vnni);
#endif
#if defined(QERVE_HAS_AVX512)
    isas |= isa_bit(Isa::avx512_vnni);
#endif
#if defined(QERVE_HAS_AMX)
    isas |= isa_bit(Isa::amx);
#endif
    return isas;
}

std::string missing_features(Isa isa, uint32_t features) {
    const uint32_t missing = kIsas[static_cast<int>(isa)].required & ~features;
    std::string names;
    for (const FeatureName& feature : kFeatureNames) {
        if (missing & feature.bit) append(names, feature.name);
    }
    return names;
}

std::string isa_names(uint32_t isas) {
    std::string names;
    for (int i = kNumIsas - 1; i >= 0; --i) {
        if (isas & isa_bit(static_cast<Isa>(i))) append(names, kIsas[i].name);
    }
    return names;
}

IsaChoice choose_isa(const char* forced, uint32_t compiled, uint32_t features) {
    if (forced == nullptr || *forced == '\0') {
        for (int i = kNumIsas - 1; i >= 0; --i) {
            const Isa isa = static_cast<Isa>(i);
            if ((compiled & isa_bit(isa)) && missing_features(isa, features).empty()) return {isa, ""};
        }
        return {std::nullopt, "the library holds no instruction set that this processor can run"};
    }
    const std::string name = forced;
    const std::optional<Isa> isa = isa_named(name);
    if (!isa) return {std::nullopt, "there is no instruction set \"" + name + "\"; there are " + isa_names(~0u)};
    if (!(compiled & isa_bit(*isa))) {
        return {std::nullopt, "this build holds no kernels for " + name + "; it holds " + isa_names(compiled)};
    }
    const std::string missing = missing_features(*isa, features);
    if (!missing.empty()) return {std::nullopt, "this machine cannot run " + name + ": it lacks " + missing};
    return {*isa, ""};
}

IsaChoice choose_isa(const char* forced) { return choose_isa(forced, compiled_isas(), detected_features()); }

}  // namespace qerve
