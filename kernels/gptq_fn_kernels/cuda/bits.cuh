// From codes to pairs of 16-bit floats, in registers. Words are laid out as gptq_fn_kernels/triton/layout.py says.

typedef unsigned int u32;
typedef unsigned short u16;

constexpr int FIELDS = 16 / BITS;            // codes in a half of a word
constexpr int CHUNK = 32 * FIELDS;           // inputs of 16 words
constexpr int GROUPS = CHUNK / GROUP;

// A code put into the mantissa of a float16 whose exponent makes it count 1: 1024 + code, or 64 + code four bits higher.
// Held where the compiler cannot see the constants: it would take two instructions for and + or.
//
// A bfloat16 needs no exponent: where its bits are those of a whole number up to 255, it is that number of 2^-133, its smallest. No factor
// makes that 1, the largest being 2^127, so levels, weights and sums are counted in units of 64 there.
struct Magic { u32 low, high; };

__device__ __forceinline__ Magic magic_of() {
    Magic magic;
    asm volatile("mov.b32 %0, %1;" : "=r"(magic.low) : "n"(0x64006400));
    asm volatile("mov.b32 %0, %1;" : "=r"(magic.high) : "n"(0x54005400));
    return magic;
}

constexpr float UNIT = BRAIN ? 64 : 1;

// What one group of an output is multiplied with, twice each: the scale, what its rounding to bfloat16 lost, and what to subtract, which
// is 1024 and 64 more than the zero point, or to add in bfloat16, in units. And the scale as it is.
struct Scale { u32 near, lost, low, high; float full; };

__device__ __forceinline__ u32 twice(u32 half) { return __byte_perm(half, 0, 0x1010); }

__device__ __forceinline__ u32 halves_of(float f) {
    u32 d;
    asm("cvt.rn.f16x2.f32 %0, %1, %1;" : "=r"(d) : "f"(f));
    return d;
}

__device__ __forceinline__ u32 brains_of(float f) {
    u32 d;
    asm("cvt.rn.bf16x2.f32 %0, %1, %1;" : "=r"(d) : "f"(f));
    return d;
}

__device__ __forceinline__ float float_of(u32 half, bool brain) {
    float f;
    if (brain) return __uint_as_float(half << 16);
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"((u16)half));
    return f;
}

__device__ __forceinline__ u32 short_at(u32 address) {
    u16 v;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(address));
    return v;
}

__device__ __forceinline__ void load(u32 (&to)[4], u32 address) {
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(address));
}

__device__ __forceinline__ void load(float (&to)[4], u32 address) {
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(to[0]), "=f"(to[1]), "=f"(to[2]), "=f"(to[3]) : "r"(address));
}

// The scale, so many times, and with ZEROS the zero point behind it (a whole number in float16), at this address of shared memory.
__device__ __forceinline__ Scale scale_of(u32 address, float times = 1) {
    Scale s = {};
    const u32 stored = short_at(address);
    s.full = float_of(stored, SCALES) * times;
    if (BRAIN) {
        s.near = SCALES && times == 1 ? twice(stored) : brains_of(s.full);
        if (!SCALES) s.lost = brains_of(s.full - __uint_as_float(s.near << 16));
    } else {
        s.near = SCALES ? halves_of(s.full) : twice(stored);
    }
    if (ZEROS) {
        const float zero = float_of(short_at(address + 2), false);
        s.low = BRAIN ? brains_of(-zero / UNIT) : halves_of(1024 + zero);
        s.high = halves_of(64 + zero);
    } else {
        s.low = BRAIN ? (BITS == 4 ? 0xBE00BE00 : 0xC000C000) : BITS == 4 ? 0x64086408 : 0x64806480;
        s.high = 0x54805480;
    }
    return s;
}

__device__ __forceinline__ u32 minus(u32 a, u32 b) {
    u32 d;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

__device__ __forceinline__ u32 fused(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

// (word & mask) | magic
template <u32 mask>
__device__ __forceinline__ u32 masked(u32 word, u32 magic) {
    u32 d;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(word), "n"(mask), "r"(magic));
    return d;
}

// What two neighbouring inputs have above their zero points, in units: `field` of both halves of a word. Up to 255 levels, exact in both types.
__device__ __forceinline__ u32 levels_of(u32 word, int field, const Scale& s, const Magic& magic) {
    constexpr u32 lower = BITS == 4 ? 0x000F000F : 0x00FF00FF, upper = 0x00F000F0;
    const u32 moved = word >> (BITS * field & 8);
    const bool high = BITS == 4 && field % 2;
    constexpr u32 from_low = 0x7F007F00, from_high = 0x7D007D00;  // 2^127 and 2^123
    if (BRAIN) return high ? fused(moved & upper, from_high, s.low) : fused(moved & lower, from_low, s.low);
    return high ? minus(masked<upper>(moved, magic.high), s.high) : minus(masked<lower>(moved, magic.low), s.low);
}

// Their weights, in the same units.
__device__ __forceinline__ u32 weights_of(u32 word, int field, const Scale& s, const Magic& magic) {
    u32 levels = levels_of(word, field, s, magic);
    if (BRAIN) return fused(levels, s.near, SCALES ? 0x80008000 : fused(levels, s.lost, 0x80008000));
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(levels) : "r"(levels), "r"(s.near));
    return levels;
}

// Two sums, which were in units, rounded to the activations' type.
__device__ __forceinline__ u32 rounded(float low, float high) {
    u32 d;
    low *= UNIT, high *= UNIT;
    if (BRAIN) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}
