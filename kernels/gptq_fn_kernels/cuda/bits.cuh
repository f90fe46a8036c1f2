// From codes to pairs of 16-bit floats, in registers. Words are laid out as gptq_fn_kernels/triton/layout.py says.

typedef unsigned int u32;
typedef unsigned short u16;

constexpr int FIELDS = 16 / BITS;            // codes in a half of a word
constexpr int CHUNK = 32 * FIELDS;           // inputs of 16 words
constexpr int GROUPS = CHUNK / GROUP;

// A code put into the mantissa of a float whose exponent makes it count 1: 1024 + code, or 64 + code four bits higher, or
// 128 + code in bfloat16. Held where the compiler cannot see the constants: it would take two instructions for and + or.
struct Magic { u32 low, high; };

__device__ __forceinline__ Magic magic_of() {
    Magic magic;
    asm volatile("mov.b32 %0, %1;" : "=r"(magic.low) : "n"(BRAIN && BITS == 4 ? 0x43004300 : 0x64006400));
    asm volatile("mov.b32 %0, %1;" : "=r"(magic.high) : "n"(0x54005400));
    return magic;
}

// What one group of an output is multiplied with, twice each: the scale, what its rounding to bfloat16 lost, and 1024, 64
// or 128 more than the zero point, negative for bfloat16. And the scale as it is.
struct Scale { u32 near, lost, low, high; float full; };

__device__ __forceinline__ u32 twice(u32 half) { return __byte_perm(half, 0, 0x1010); }

__device__ __forceinline__ u32 halves_of(float f) {
    u16 h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return twice(h);
}

__device__ __forceinline__ u32 brains_of(float f) {
    u16 h;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return twice(h);
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

// The scale, and with ZEROS the zero point behind it (a whole number in float16), at this address of shared memory.
__device__ __forceinline__ Scale scale_of(u32 address) {
    Scale s = {};
    const u32 stored = short_at(address);
    s.full = float_of(stored, SCALES);
    if (BRAIN) {
        s.near = SCALES ? twice(stored) : brains_of(s.full);
        if (!SCALES) s.lost = brains_of(s.full - __uint_as_float(s.near << 16));
    } else {
        s.near = SCALES ? halves_of(s.full) : twice(stored);
    }
    if (ZEROS) {
        const float zero = float_of(short_at(address + 2), false);
        s.low = BRAIN && BITS == 4 ? brains_of(-128 - zero) : halves_of(1024 + zero);
        s.high = halves_of(64 + zero);
    } else {
        s.low = BRAIN && BITS == 4 ? 0xC308C308 : BITS == 4 ? 0x64086408 : 0x64806480;
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

// What two neighbouring inputs have above their zero points: `field` of both halves of a word. Whole numbers up to 255, exact in both types.
__device__ __forceinline__ u32 levels_of(u32 word, int field, const Scale& s, const Magic& magic) {
    if (BRAIN && BITS == 4) return fused(masked<0x000F000F>(word >> (4 * field), magic.low), 0x3F803F80, s.low);
    if (BITS == 4) {
        const u32 moved = field < 2 ? word : word >> 8;
        return field % 2 ? minus(masked<0x00F000F0>(moved, magic.high), s.high) : minus(masked<0x000F000F>(moved, magic.low), s.low);
    }
    u32 levels = minus(masked<0x00FF00FF>(word >> (8 * field), magic.low), s.low);
    if (BRAIN) {
        const float low = float_of(levels & 0xFFFF, false), high = float_of(levels >> 16, false);
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(levels) : "f"(high), "f"(low));
    }
    return levels;
}

// Their weights.
__device__ __forceinline__ u32 weights_of(u32 word, int field, const Scale& s, const Magic& magic) {
    u32 levels = levels_of(word, field, s, magic);
    if (BRAIN) return fused(levels, s.near, SCALES ? 0x80008000 : fused(levels, s.lost, 0x80008000));
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(levels) : "r"(levels), "r"(s.near));
    return levels;
}

// Two sums, rounded to the activations' type.
__device__ __forceinline__ u32 rounded(float low, float high) {
    u32 d;
    if (BRAIN) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}
