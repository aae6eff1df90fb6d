// What one warp does together: loads past the first level of the cache, matrix fragments, products
// of 16 by 16 and 16 by 8 matrices, reductions. Each function wraps instructions of PTX (sm_80).
//
// A fragment is a matrix whose elements are spread over the lanes, as the PTX manual lays out for
// `mma.m16n8k16`. In lane `l`, let `row = l / 4` and `pair = 2 * (l % 4)`:
//
//   left, 16 x 16    register 0: row `row`, columns `pair` and `pair + 1`; 1: eight rows below;
//                    2 and 3: the same, eight columns to the right
//   right, 16 x 8    register 0: rows `pair` and `pair + 1`, column `row`; 1: eight rows below
//   sums, 16 x 8     numbers 0 and 1: row `row`, columns `pair` and `pair + 1`; 2 and 3: eight rows
//                    below
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace attention {

constexpr unsigned LANES = 32;
constexpr unsigned ALL_LANES = 0xffffffff;

__device__ inline unsigned lane_index() { return threadIdx.x % LANES; }

// `tests/host_kernels/` has functions for the host instead.
#ifndef ATTENTION_ON_THE_HOST

// Lets the next kernel of the stream begin, as far as it does not wait for this one, and waits until
// the kernels before this one have ended. Only a launch that asks for it begins earlier than that.
__device__ inline void wait_for_earlier_kernels() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;\ngriddepcontrol.wait;\n" ::: "memory");
#endif
}

// Loads four, two or one registers of numbers that nobody writes meanwhile and that are read once;
// zeros if not `valid`.
template <unsigned COUNT>
__device__ inline void load(unsigned *to, const char *from, bool valid) {
    const unsigned is_valid = valid ? 1 : 0;
    if constexpr (COUNT == 4) {
        asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %5, 0;\n"
                     "mov.u32 %0, 0;\nmov.u32 %1, 0;\nmov.u32 %2, 0;\nmov.u32 %3, 0;\n"
                     "@p ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];\n}\n"
                     : "=&r"(to[0]), "=&r"(to[1]), "=&r"(to[2]), "=&r"(to[3])
                     : "l"(from), "r"(is_valid));
    } else if constexpr (COUNT == 2) {
        asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %3, 0;\n"
                     "mov.u32 %0, 0;\nmov.u32 %1, 0;\n"
                     "@p ld.global.nc.L1::no_allocate.L2::128B.v2.u32 {%0, %1}, [%2];\n}\n"
                     : "=&r"(to[0]), "=&r"(to[1])
                     : "l"(from), "r"(is_valid));
    } else {
        asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %2, 0;\nmov.u32 %0, 0;\n"
                     "@p ld.global.nc.L1::no_allocate.L2::128B.u32 %0, [%1];\n}\n"
                     : "=&r"(to[0])
                     : "l"(from), "r"(is_valid));
    }
}

// Begins to copy 4 bytes to shared memory; zeros if not `valid`.
__device__ inline void copy_4_bytes(void *to, const void *from, bool valid) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(
                     static_cast<unsigned>(__cvta_generic_to_shared(to))),
                 "l"(from), "r"(valid ? 4 : 0)
                 : "memory");
}

// Waits for this thread's copies.
__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;\n" ::: "memory"); }

// Adds 1 and returns what was there. What the block wrote before, in the order that its barriers
// give, comes before the count; what others wrote before theirs can be read after it.
__device__ inline unsigned count_in_order(unsigned *to) {
    unsigned before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;\n"
                 : "=r"(before)
                 : "l"(to)
                 : "memory");
    return before;
}

// Numbers below the normal ones count as 0.
__device__ inline float power_of_2(float exponent) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(result) : "f"(exponent));
    return result;
}

// Adds left * right to sums.
__device__ inline void multiply(float (&sums)[4], const unsigned (&left)[4],
                                const unsigned (&right)[2], __half) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));
}

__device__ inline void multiply(float (&sums)[4], const unsigned (&left)[4],
                                const unsigned (&right)[2], __nv_bfloat16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));
}

#endif

// A quotient of numbers below 2^18, faster than a division. It is exact: the number plus a half is
// no nearer to a multiple of the divisor than a float of 24 bits can tell.
__device__ inline unsigned quotient(unsigned number, unsigned divisor) {
    return static_cast<unsigned>(__fdividef(static_cast<float>(number) + 0.5F,
                                            static_cast<float>(divisor)));
}

// The largest of the lanes whose numbers differ in the bits of `MASK`.
template <unsigned MASK> __device__ inline float largest(float own) {
    for (unsigned bit = LANES / 2; bit != 0; bit /= 2) {
        if ((MASK & bit) != 0) {
            own = fmaxf(own, __shfl_xor_sync(ALL_LANES, own, bit));
        }
    }
    return own;
}

// The sum over the lanes whose numbers differ in the bits of `MASK`.
template <unsigned MASK> __device__ inline float sum(float own) {
    for (unsigned bit = LANES / 2; bit != 0; bit /= 2) {
        if ((MASK & bit) != 0) {
            own += __shfl_xor_sync(ALL_LANES, own, bit);
        }
    }
    return own;
}

// Loads 8 or 16 bytes from the second level of the cache: another block wrote them.
template <typename T> __device__ inline void load_past_first_level(T &to, const void *from) {
    if constexpr (sizeof(T) == 8) {
        reinterpret_cast<float2 &>(to) = __ldcg(static_cast<const float2 *>(from));
    } else {
        reinterpret_cast<float4 &>(to) = __ldcg(static_cast<const float4 *>(from));
    }
}

__device__ inline float wide(float number) { return number; }
__device__ inline float wide(__half number) { return __half2float(number); }
__device__ inline float wide(__nv_bfloat16 number) { return __bfloat162float(number); }

__device__ inline void narrow(float number, float *to) { *to = number; }
__device__ inline void narrow(float number, __half *to) { *to = __float2half_rn(number); }
__device__ inline void narrow(float number, __nv_bfloat16 *to) { *to = __float2bfloat16_rn(number); }

__device__ inline unsigned bits_of(__half2 pair) { return reinterpret_cast<unsigned &>(pair); }
__device__ inline unsigned bits_of(__nv_bfloat162 pair) {
    return reinterpret_cast<unsigned &>(pair);
}

// Two numbers in one register, the first in the low half.
__device__ inline unsigned packed(float low, float high, __half) {
    return bits_of(__floats2half2_rn(low, high));
}
__device__ inline unsigned packed(float low, float high, __nv_bfloat16) {
    return bits_of(__floats2bfloat162_rn(low, high));
}

// Four numbers side by side, at a multiple of their size.
__device__ inline void narrow(const float4 &numbers, float *to) {
    *reinterpret_cast<float4 *>(to) = numbers;
}
template <typename T> __device__ inline void narrow(const float4 &numbers, T *to) {
    const uint2 bits = {packed(numbers.x, numbers.y, T()), packed(numbers.z, numbers.w, T())};
    *reinterpret_cast<uint2 *>(to) = bits;
}

} // namespace attention
