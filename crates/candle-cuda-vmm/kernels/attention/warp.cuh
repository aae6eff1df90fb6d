// What one warp does together: asynchronous copies to shared memory, matrix fragments, products of
// 16 by 16 and 16 by 8 matrices, reductions. Each function wraps instructions of PTX (sm_80).
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

__device__ inline unsigned shared_address(const void *pointer) {
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// Begins to copy 16 bytes to shared memory. If not `valid`, zeros come there and nothing is read.
__device__ inline void copy_16_bytes(void *to, const void *from, bool valid) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(
                     shared_address(to)),
                 "l"(from), "r"(valid ? 16 : 0)
                 : "memory");
}

// Closes a group of copies. A group may be empty.
__device__ inline void end_group() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

template <unsigned PENDING> __device__ inline void wait_for_groups() {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(PENDING) : "memory");
}

// Loads a left fragment. Each lane names 16 bytes: row `lane % 16`, columns from 8 * (lane / 16).
__device__ inline void load_left(unsigned (&to)[4], const void *from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(from))
                 : "memory");
}

// Loads a left fragment that lies transposed: a row in memory is a column of the fragment. Each
// lane names 16 bytes: the column `lane % 8 + 8 * (lane / 16)`, rows from 8 * (lane / 8 % 2).
__device__ inline void load_left_transposed(unsigned (&to)[4], const void *from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(from))
                 : "memory");
}

// Transposes an 8 x 8 matrix whose rows lie as in one register of a fragment.
__device__ inline unsigned transposed(unsigned own) {
    unsigned result;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;\n" : "=r"(result) : "r"(own));
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

// Waits until at most `pending` groups of this lane's copies are not complete. At most 7.
__device__ inline void wait_for_all_but(unsigned pending) {
    switch (pending) {
    case 0: return wait_for_groups<0>();
    case 1: return wait_for_groups<1>();
    case 2: return wait_for_groups<2>();
    case 3: return wait_for_groups<3>();
    case 4: return wait_for_groups<4>();
    case 5: return wait_for_groups<5>();
    case 6: return wait_for_groups<6>();
    default: return wait_for_groups<7>();
    }
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
template <unsigned MASK, typename N> __device__ inline N sum(N own) {
    for (unsigned bit = LANES / 2; bit != 0; bit /= 2) {
        if ((MASK & bit) != 0) {
            own += __shfl_xor_sync(ALL_LANES, own, bit);
        }
    }
    return own;
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

} // namespace attention
