// Which instruction sets this processor and its operating system can run, and the choice of one of those compiled in.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace qerve {

// In order of preference, the last one first.
enum class Isa : int { portable, neon_dotprod, avx2, avx_vnni, avx512_vnni, amx };

constexpr int kNumIsas = static_cast<int>(Isa::amx) + 1;

// What a translation unit's compiler flags let it use, one bit each. `zmm_state` and `tile_state`: the operating system
// saves these registers, and lets this process use them.
enum Feature : uint32_t {
    kAvx2 = 1u << 0,
    kFma = 1u << 1,
    kF16c = 1u << 2,
    kBmi2 = 1u << 3,
    kAvxVnni = 1u << 4,
    kAvx512F = 1u << 5,
    kAvx512Bw = 1u << 6,
    kAvx512Vl = 1u << 7,
    kAvx512Dq = 1u << 8,
    kAvx512Vnni = 1u << 9,
    kAvx512Vbmi = 1u << 10,
    kAvx512Bf16 = 1u << 11,
    kAmxTile = 1u << 12,
    kAmxInt8 = 1u << 13,
    kAmxBf16 = 1u << 14,
    kYmmState = 1u << 15,
    kZmmState = 1u << 16,
    kTileState = 1u << 17,
    kNeonDotprod = 1u << 18,
    kNeonFp16 = 1u << 19,
};

// What the CPUID instruction and the XCR0 register say, as they say it.
struct X86Words {
    uint32_t leaf1_ecx = 0;
    uint32_t leaf7_ebx = 0;
    uint32_t leaf7_ecx = 0;
    uint32_t leaf7_edx = 0;
    uint32_t leaf7_1_eax = 0;
    uint64_t xcr0 = 0;
};

// The features that `words` stand for. `kTileState` needs more than they say: see `detected_features`.
uint32_t decode_x86(const X86Words& words);

// The features of this machine. On Linux this asks the kernel for the AMX tile registers where the processor has them:
// a process may not touch them before, and asking twice is harmless.
uint32_t detected_features();

bool has_avx2();
bool has_avx_vnni();
bool has_avx512_vnni();
bool has_amx_int8();
bool has_neon_dotprod();

const char* isa_name(Isa isa);
std::optional<Isa> isa_named(const std::string& name);

constexpr uint32_t isa_bit(Isa isa) { return 1u << static_cast<int>(isa); }

// Bits of the sets that this library was compiled for; `Isa::portable` is always one of them.
uint32_t compiled_isas();

// What `features` lack for `isa`, as a text ("AVX512_VBMI, AVX512_VNNI"); empty: nothing.
std::string missing_features(Isa isa, uint32_t features);

// The names of the sets in `isas`, the preferred one first, joined by ", ".
std::string isa_names(uint32_t isas);

struct IsaChoice {
    std::optional<Isa> isa;  // none: `error` says why
    std::string error;
};

// The set called `forced`, or the best of `compiled` (bits) that `features` allow where `forced` is null or empty.
IsaChoice choose_isa(const char* forced, uint32_t compiled, uint32_t features);

// The same, of this library on this machine.
IsaChoice choose_isa(const char* forced);

}  // namespace qerve
