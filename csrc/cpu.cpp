#include "cpu.hpp"

#include <cstdint>

#if defined(LINSTATE_X86)
#if defined(_MSC_VER)
#include <immintrin.h>
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#endif
#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace linstate {
namespace {

// What x86 says of itself, read once. Kept apart from its decoding so that the decoding is checked at
// compile time, on machines that have none of the instructions.
struct X86Registers {
    std::uint32_t leaf1_ecx = 0;    // CPUID(1).ECX
    std::uint32_t leaf7_ebx = 0;    // CPUID(7, 0).EBX
    std::uint32_t leaf7_edx = 0;    // CPUID(7, 0).EDX
    std::uint32_t leaf7_1_eax = 0;  // CPUID(7, 1).EAX
    std::uint64_t xcr0 = 0;         // register files that the operating system saves; 0 without XGETBV
};

constexpr bool has(std::uint64_t word, int bit) { return ((word >> bit) & 1u) != 0; }

// A processor may have an instruction whose registers the operating system does not save over a context
// switch; using it would trap. So each feature asks both: its CPUID bit, and its XCR0 bits.
// Bits: Intel SDM vol. 1, 13.3 (XCR0) and vol. 2A, CPUID.
constexpr CpuFeatures decode(const X86Registers& r) {
    const bool osxsave = has(r.leaf1_ecx, 27);
    const bool ymm = osxsave && (r.xcr0 & 0x6) == 0x6;           // SSE, AVX state
    const bool zmm = ymm && (r.xcr0 & 0xE0) == 0xE0;             // opmask, ZMM_Hi256, Hi16_ZMM
    const bool tile = osxsave && (r.xcr0 & 0x60000) == 0x60000;  // XTILECFG, XTILEDATA

    CpuFeatures f;
    f.avx2 = ymm && has(r.leaf7_ebx, 5);
    f.fma = ymm && has(r.leaf1_ecx, 12);
    f.avx512f = zmm && has(r.leaf7_ebx, 16);
    f.avx512 = f.avx512f && has(r.leaf7_ebx, 30) && has(r.leaf7_ebx, 17) && has(r.leaf7_ebx, 31);  // BW, DQ, VL
    f.avx512_bf16 = f.avx512f && has(r.leaf7_1_eax, 5);
    // Linux also wants each process to ask for the tile registers: allow_tiles().
    f.amx_bf16 = tile && has(r.leaf7_edx, 24) && has(r.leaf7_edx, 22);  // AMX-TILE and AMX-BF16
    return f;
}

constexpr X86Registers kSapphireRapids{(1u << 27) | (1u << 12), (1u << 5) | (1u << 16) | (1u << 17) | (1u << 30) | (1u << 31),
                                       (1u << 24) | (1u << 22), 1u << 5, 0x602E7};
constexpr X86Registers kKnightsLanding{(1u << 27) | (1u << 12), (1u << 5) | (1u << 16), 0, 0, 0xE7};
constexpr X86Registers with_xcr0(X86Registers r, std::uint64_t xcr0) {
    r.xcr0 = xcr0;
    return r;
}
static_assert(decode(kSapphireRapids).amx_bf16 && decode(kSapphireRapids).avx512_bf16);
static_assert(decode(kSapphireRapids).avx512);
static_assert(decode(kKnightsLanding).avx512f && !decode(kKnightsLanding).avx512, "AVX512F without BW, DQ, VL");
static_assert(!decode(with_xcr0(kSapphireRapids, 0x2E7)).amx_bf16, "tiles not saved by the system");
static_assert(decode(with_xcr0(kSapphireRapids, 0x2E7)).avx512f);
static_assert(!decode(with_xcr0(kSapphireRapids, 0x7)).avx512f, "ZMM not saved by the system");
static_assert(decode(with_xcr0(kSapphireRapids, 0x7)).avx2 && decode(with_xcr0(kSapphireRapids, 0x7)).fma);
static_assert(!decode(with_xcr0(kSapphireRapids, 0x3)).avx2, "YMM not saved by the system");

#if defined(LINSTATE_X86)

struct Cpuid {
    std::uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Cpuid cpuid(std::uint32_t leaf, std::uint32_t subleaf) {
    Cpuid r;
#if defined(_MSC_VER)
    int regs[4] = {};
    __cpuid(regs, 0);
    if (static_cast<std::uint32_t>(regs[0]) < leaf) return r;
    __cpuidex(regs, static_cast<int>(leaf), static_cast<int>(subleaf));
    r.eax = static_cast<std::uint32_t>(regs[0]);
    r.ebx = static_cast<std::uint32_t>(regs[1]);
    r.ecx = static_cast<std::uint32_t>(regs[2]);
    r.edx = static_cast<std::uint32_t>(regs[3]);
#else
    // Returns 0 and leaves the zeros where the leaf does not exist.
    __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
#endif
    return r;
}

std::uint64_t read_xcr0() {
#if defined(_MSC_VER)
    return _xgetbv(0);
#else
    // The instruction itself, as the intrinsic would need the whole file compiled with -mxsave.
    std::uint32_t eax = 0, edx = 0;
    __asm__ volatile("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
    return (static_cast<std::uint64_t>(edx) << 32) | eax;
#endif
}

CpuFeatures read_features() {
    const Cpuid leaf1 = cpuid(1, 0);
    const Cpuid leaf7 = cpuid(7, 0);
    X86Registers r;
    r.leaf1_ecx = leaf1.ecx;
    r.leaf7_ebx = leaf7.ebx;
    r.leaf7_edx = leaf7.edx;
    if (leaf7.eax >= 1) r.leaf7_1_eax = cpuid(7, 1).eax;  // leaf 7 says how many subleaves it has
    if (has(r.leaf1_ecx, 27)) r.xcr0 = read_xcr0();
    return decode(r);
}

#else

CpuFeatures read_features() {
    CpuFeatures f;
#if defined(__aarch64__) || defined(_M_ARM64) || defined(__ARM_NEON)
    f.neon = true;  // part of the base architecture of 64-bit Arm
#endif
    return f;
}

#endif
}  // namespace

CpuFeatures detect() {
    static const CpuFeatures features = read_features();
    return features;
}

bool allow_tiles() {
    if (!detect().amx_bf16) return false;
#if defined(__linux__) && defined(__x86_64__)
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool allowed = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
    return allowed;
#else
    return true;
#endif
}

}  // namespace linstate
