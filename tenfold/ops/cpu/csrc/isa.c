/* Which instruction sets this processor (and its operating system) has. */
#include "tenfold.h"

#if defined(__x86_64__)
#include <cpuid.h>

static uint64_t xgetbv(void) {
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
}

static unsigned detect(void) {
    enum { FMA = 1 << 12, OSXSAVE = 1 << 27, F16C = 1 << 29 };                       /* leaf 1 ecx */
    enum { AVX2 = 1 << 5, F512 = 1 << 16, DQ512 = 1 << 17, BW512 = 1 << 30 };        /* leaf 7 ebx */
    const unsigned VL512 = 1u << 31, VNNI512 = 1 << 11;                              /* leaf 7 ebx, ecx */
    unsigned a, b, c, d, found = 1u << TF_ISA_PORTABLE;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & OSXSAVE) || !(c & FMA) || !(c & F16C)) return found;
    uint64_t state = xgetbv();
    if ((state & 0x6) != 0x6 || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b & AVX2)) return found;
    found |= 1u << TF_ISA_AVX2;
    unsigned wide = F512 | DQ512 | BW512 | VL512;
    if ((state & 0xe6) == 0xe6 && (b & wide) == wide && (c & VNNI512)) found |= 1u << TF_ISA_AVX512;
    return found;
}

#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>

static unsigned detect(void) {
    const unsigned long ASIMDDP = 1ul << 20, ASIMDHP = 1ul << 10, FPHP = 1ul << 9;
    unsigned long need = ASIMDDP | ASIMDHP | FPHP, caps = getauxval(AT_HWCAP);
    return 1u << TF_ISA_PORTABLE | ((caps & need) == need ? 1u << TF_ISA_NEON : 0);
}

#elif defined(__aarch64__) && defined(__APPLE__)

static unsigned detect(void) { return 1u << TF_ISA_PORTABLE | 1u << TF_ISA_NEON; } /* every Apple core has dotprod and fp16 */

#else

static unsigned detect(void) { return 1u << TF_ISA_PORTABLE; }

#endif

int tf_isa_index = TF_ISA_PORTABLE;

unsigned tf_isa_available(void) {
    unsigned built = 0;
    TF_IF_PORTABLE(built |= 1u << TF_ISA_PORTABLE;)
    TF_IF_AVX2(built |= 1u << TF_ISA_AVX2;)
    TF_IF_AVX512(built |= 1u << TF_ISA_AVX512;)
    TF_IF_NEON(built |= 1u << TF_ISA_NEON;)
    return detect() & built;
}

int tf_init(int isa) {
    unsigned available = tf_isa_available();
    if (isa < 0)
        for (int i = 0; i < TF_ISA_COUNT; i++)
            if (available >> i & 1) isa = i;
    if (isa < 0 || isa >= TF_ISA_COUNT || !(available >> isa & 1)) return -1;
    return tf_isa_index = isa;
}
