// The running softmax over the keys of one warp, after Milakov and Gimelshein, "Online normalizer
// calculation for softmax" (2018), in powers of 2.
#pragma once
#include "schedule.cuh"

namespace attention {

constexpr float LOG2_E = 1.4426950408889634F;

__device__ inline float minus_infinity() { return __int_as_float(0xff800000); }

// The score of a product, in units of log 2.
__device__ inline float score(float product, const Arguments &given) {
    const float scaled = product * given.scale;
    return LOG2_E * (given.cap == 0.0F ? scaled : given.cap * tanhf(scaled / given.cap));
}

// What exponents are relative to. If all scores are -inf, 0: else -inf minus -inf would come up.
__device__ inline float base_of(float max) { return max == minus_infinity() ? 0.0F : max; }

// The softmax of one query so far.
struct Running {
    float max;
    // The sum of this lane's powers, relative to `max`.
    float total;

    __device__ void clear() { max = minus_infinity(), total = 0.0F; }

    // Goes on with a new maximum; returns what earlier sums are to be multiplied with.
    __device__ float raise(float new_max) {
        const float factor = exp2f(max - base_of(new_max));
        max = new_max;
        total *= factor;
        return factor;
    }

    // The power of a score, which is added.
    __device__ float add(float score) {
        const float power = exp2f(score - base_of(max));
        total += power;
        return power;
    }
};

// What a warp or a thread block has of an item: for each query head a maximum, the sum of the
// powers, and the sums of values weighted with them.
template <unsigned V_DIM> struct Partial {
    // Four more than needed, so that the lanes write to different banks.
    static constexpr unsigned STRIDE = V_DIM + 4;
    float sums[HEADS][STRIDE];
    float max[HEADS];
    float total[HEADS];
};

} // namespace attention
