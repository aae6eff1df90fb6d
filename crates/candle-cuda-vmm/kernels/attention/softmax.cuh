// The running softmax over the keys of one warp, after Milakov and Gimelshein, "Online normalizer
// calculation for softmax" (2018), in powers of 2.
#pragma once
#include "schedule.cuh"

namespace attention {

constexpr float LOG2_E = 1.4426950408889634F;

__device__ inline float minus_infinity() { return __int_as_float(0xff800000); }

// Turns products into scores, in units of log 2.
template <unsigned COUNT>
__device__ inline void score(float (&products)[COUNT], const Arguments &given) {
    if (given.cap == 0.0F) {
        for (float &product : products) {
            product *= given.scale * LOG2_E;
        }
    } else {
        for (float &product : products) {
            product = given.cap * LOG2_E * tanhf(product * given.scale);
        }
    }
}

// What exponents are relative to. If all scores are -inf, 0: else -inf minus -inf would come up.
__device__ inline float base_of(float max) { return max == minus_infinity() ? 0.0F : max; }

// The softmax of one query so far.
struct Running {
    float max;
    // The sum of powers, relative to `max`: a lane's, or those that were joined.
    float total;

    __device__ void clear() { max = minus_infinity(), total = 0.0F; }

    // Goes on with a new maximum; returns what earlier sums are to be multiplied with.
    __device__ float raise(float new_max) {
        const float factor = power_of_2(max - base_of(new_max));
        max = new_max;
        total *= factor;
        return factor;
    }

    // The power of a score, which is added.
    __device__ float add(float score) {
        const float power = power_of_2(score - base_of(max));
        total += power;
        return power;
    }
};

// What a warp or a thread block has of an item: for each query head the softmax, and the sums of
// values weighted with the powers.
template <unsigned V_DIM> struct Partial {
    // Four more than needed, so that the lanes write to different banks.
    static constexpr unsigned STRIDE = V_DIM + 4;
    float sums[HEADS][STRIDE];
    Running softmax[HEADS];
};

} // namespace attention
