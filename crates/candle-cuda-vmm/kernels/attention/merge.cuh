// Joins what warps, and then thread blocks, have of an item.
//
// A block whose segment is a whole item writes the output. Otherwise it writes a partial result to
// one of its two slots in device memory and counts its arrival. The last block that arrives joins
// all partial results in the order of the blocks. So the order in which blocks run does not show in
// the output, and there are no atomic additions of floating-point numbers.
//
// A block has at most two segments that are not whole: the one with which its part begins (slot 0)
// and the one with which it ends (slot 1). A segment that is both is in slot 0, unless the item
// begins with it.
#pragma once
#include "softmax.cuh"

namespace attention {

// Warps that a block may have.
constexpr unsigned WARPS_MAX = 16;

// What the warps of a block have of an item, in shared memory.
template <unsigned V_DIM> struct OfWarps {
    // Of each warp and head. The warps scale what they have to the largest before they store it.
    float max[WARPS_MAX][HEADS];
    Partial<V_DIM> partials[];

    __device__ float max_of(unsigned head, unsigned warps) const {
        float all = minus_infinity();
#pragma unroll 4
        for (unsigned warp = 0; warp < warps; ++warp) {
            all = fmaxf(all, max[warp][head]);
        }
        return all;
    }

    __device__ float total_of(unsigned head, unsigned warps) const {
        float all = 0.0F;
#pragma unroll 4
        for (unsigned warp = 0; warp < warps; ++warp) {
            all += partials[warp].softmax[head].total;
        }
        return all;
    }
};

__device__ inline void add(float4 &to, const float4 &more, float weight) {
    to.x += weight * more.x;
    to.y += weight * more.y;
    to.z += weight * more.z;
    to.w += weight * more.w;
}

// Adds what the first `count` warps have, in their order. Calls `store(head, dim, sums)` for four
// dims of each head. All threads of the block call it.
template <unsigned V_DIM, typename Store>
__device__ inline void add_warps(const OfWarps<V_DIM> &of_warps, unsigned count, unsigned heads,
                                 Store store) {
    constexpr unsigned COLUMNS = V_DIM / 4;
#pragma unroll 1
    for (unsigned at = threadIdx.x; at < heads * COLUMNS; at += blockDim.x) {
        const unsigned head = at / COLUMNS;
        const unsigned dim = at % COLUMNS * 4;
        float4 sums = {};
#pragma unroll 8
        for (unsigned warp = 0; warp < count; ++warp) {
            const float *its = of_warps.partials[warp].sums[head] + dim;
            add(sums, *reinterpret_cast<const float4 *>(its), 1.0F);
        }
        store(head, dim, sums);
    }
}

// What a thread has of four dims of a head.
struct Column {
    float4 sums;
    Running softmax;

    __device__ void clear() {
        sums = {};
        softmax.clear();
    }

    // Goes on with a maximum that is not smaller.
    __device__ void raise(float max) {
        const float factor = softmax.raise(max);
        const float4 before = sums;
        sums = {};
        attention::add(sums, before, factor);
    }

    // Adds more, whose maximum is not larger.
    __device__ void add(const float4 &more, const Running &its) {
        const float weight = power_of_2(its.max - base_of(softmax.max));
        softmax.total += weight * its.total;
        attention::add(sums, more, weight);
    }
};

// One for each thread, in shared memory.
using Columns = Column[WARPS_MAX * LANES];

// Adds the partial results of the `count` blocks from `first` on, in a fixed order. Calls
// `store(head, dim, sums, total)` for four dims of each head. All threads of the block call it.
//
// If there are more threads than columns of four dims, groups of threads share the partial results,
// and the first group adds what the others have.
template <unsigned V_DIM, typename Store>
__device__ inline void add_blocks(Columns &of_groups, const Partial<V_DIM> *slots, unsigned first,
                                  unsigned count, unsigned heads, Store store) {
    constexpr unsigned COLUMNS = V_DIM / 4;
    // Loaded at once.
    constexpr unsigned STEPS = 8;
    const unsigned columns = heads * COLUMNS;
    const unsigned groups = columns < blockDim.x ? quotient(blockDim.x, columns) : 1;
    const unsigned group = groups == 1 ? 0 : quotient(threadIdx.x, columns);
    Column own;
#pragma unroll 1
    for (unsigned at = threadIdx.x - group * columns; at < columns && group < groups;
         at += blockDim.x) {
        const unsigned head = at / COLUMNS;
        const unsigned dim = at % COLUMNS * 4;
        own.clear();
#pragma unroll 1
        for (unsigned begin = group; begin < count; begin += STEPS * groups) {
            float4 sums[STEPS];
            Running softmaxes[STEPS];
            float max = own.softmax.max;
#pragma unroll
            for (unsigned step = 0; step < STEPS; ++step) {
                const unsigned which = begin + step * groups;
                softmaxes[step].clear();
                sums[step] = {};
                if (which < count) {
                    // The item begins at the end of the first block.
                    const auto &partial = slots[2 * (first + which) + (which == 0 ? 1 : 0)];
                    load_past_first_level(softmaxes[step], &partial.softmax[head]);
                    load_past_first_level(sums[step], partial.sums[head] + dim);
                }
            }
#pragma unroll
            for (unsigned step = 0; step < STEPS; ++step) {
                max = fmaxf(max, softmaxes[step].max);
            }
            own.raise(max);
#pragma unroll
            for (unsigned step = 0; step < STEPS; ++step) {
                own.add(sums[step], softmaxes[step]);
            }
        }
        if (groups == 1) {
            store(head, dim, own.sums, own.softmax.total);
        }
    }
    if (groups == 1) {
        return;
    }
    of_groups[threadIdx.x] = own;
    __syncthreads();
    if (group == 0) {
#pragma unroll 1
        for (unsigned other = 1; other < groups; ++other) {
            const Column &its = of_groups[other * columns + threadIdx.x];
            own.raise(fmaxf(own.softmax.max, its.softmax.max));
            own.add(its.sums, its.softmax);
        }
        store(threadIdx.x / COLUMNS, threadIdx.x % COLUMNS * 4, own.sums, own.softmax.total);
    }
}

// Counts the arrival of a partial result of an item. Returns whether it was the last of `count`;
// then all of them can be read. All threads of the block call it.
__device__ inline bool is_last_to_arrive(unsigned *arrivals, unsigned count) {
    __shared__ bool is_last;
    __syncthreads();
    if (threadIdx.x == 0) {
        is_last = count_in_order(arrivals) == count - 1;
        if (is_last) {
            // For the next launch.
            *arrivals = 0;
        }
    }
    __syncthreads();
    return is_last;
}

} // namespace attention
