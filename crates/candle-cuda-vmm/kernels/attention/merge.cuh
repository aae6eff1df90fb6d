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

// Thread blocks that a launch may have, and so partial results of an item.
constexpr unsigned BLOCKS_MAX = 320;

// Weights of partial results, for each of them and each head.
using Weights = float[BLOCKS_MAX][HEADS];

// The partial results of the warps of a block, in shared memory.
template <unsigned V_DIM> struct OfWarps {
    const Partial<V_DIM> *partials;

    __device__ const Partial<V_DIM> &operator[](unsigned at) const { return partials[at]; }
    static __device__ float read(const float &number) { return number; }
};

// The partial results of an item from the block `first` on, in device memory.
template <unsigned V_DIM> struct OfBlocks {
    const Partial<V_DIM> *slots;
    unsigned first;

    __device__ const Partial<V_DIM> &operator[](unsigned at) const {
        return slots[2 * (first + at) + (at == 0 ? 1 : 0)];
    }
    // From the second level of the cache: another multiprocessor wrote it.
    static __device__ float read(const float &number) { return __ldcg(&number); }
};

// Computes the weights of partial results. If `is_final`, they make the weighted sums the output.
// Otherwise `max` and `total` get those of all. All threads of the block call it.
template <typename Partials>
__device__ inline void weigh_partials(Weights &weights, const Partials &partials, unsigned count,
                                      unsigned heads, bool is_final, float value_scale, float *max,
                                      float *total) {
    const unsigned warps = blockDim.x / LANES;
    for (unsigned head = threadIdx.x / LANES; head < heads; head += warps) {
        float own_max = minus_infinity();
        for (unsigned at = lane_index(); at < count; at += LANES) {
            own_max = fmaxf(own_max, partials.read(partials[at].max[head]));
        }
        const float all_max = largest<LANES - 1>(own_max);
        float own_total = 0.0F;
        for (unsigned at = lane_index(); at < count; at += LANES) {
            const float max_of_it = partials.read(partials[at].max[head]);
            const float weight = exp2f(max_of_it - base_of(all_max));
            own_total += weight * partials.read(partials[at].total[head]);
            weights[at][head] = weight;
        }
        const float all_total = sum<LANES - 1>(own_total);
        if (is_final) {
            // If no key counts, 0 / 0: not a number, as in a softmax of nothing but -inf.
            const float factor = value_scale / all_total;
            for (unsigned at = lane_index(); at < count; at += LANES) {
                weights[at][head] *= factor;
            }
        } else if (lane_index() == 0) {
            max[head] = all_max;
            total[head] = all_total;
        }
    }
    __syncthreads();
}

// Calls `store(head, dim, sum)` for the weighted sum of the partial results in their order.
template <unsigned V_DIM, typename Partials, typename Store>
__device__ inline void sum_partials(const Weights &weights, const Partials &partials,
                                    unsigned count, unsigned heads, Store store) {
    for (unsigned index = threadIdx.x; index < heads * V_DIM; index += blockDim.x) {
        const unsigned head = index / V_DIM;
        const unsigned dim = index % V_DIM;
        float all = 0.0F;
#pragma unroll 4
        for (unsigned at = 0; at < count; ++at) {
            all += weights[at][head] * partials.read(partials[at].sums[head][dim]);
        }
        store(head, dim, all);
    }
}

// Counts the arrival of a partial result of an item. Returns whether it was the last of `count`;
// then all of them can be read. All threads of the block call it.
__device__ inline bool is_last_to_arrive(unsigned *arrivals, unsigned count) {
    __shared__ bool is_last;
    // What each thread wrote comes before the count.
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        is_last = atomicAdd(arrivals, 1) == count - 1;
        if (is_last) {
            // For the next launch.
            *arrivals = 0;
        }
    }
    __syncthreads();
    __threadfence();
    return is_last;
}

} // namespace attention
