// Weights of tokens, as whole numbers, and what else of sampling is the same on a GPU and on the
// CPU bit by bit. `src/sampling/weights.rs` has the same functions.
//
// A sum of whole numbers does not depend on its order. So neither threads, nor the alignment of a
// row, nor the way in which a threshold is found change a token.
#pragma once

namespace sampling {

// Added to a number, it leaves the nearest integer in the low bits.
constexpr float ROUNDS = 12582912.0F;
// Octaves below the largest logit, beyond which weights are 0 for certain.
constexpr float OCTAVES = 64.0F;

// The weight of a token, `2^45 exp((logit - largest) / temperature)`, rounded.
struct Weights {
    float largest;
    // Octaves of a unit of logits.
    float scale;
    // A difference from the largest logit for which the weight is 0. It is negative.
    float farthest;

    __device__ inline Weights(float largest, float temperature) : largest(largest) {
        scale = __fdiv_rn(1.44269504F, fminf(fmaxf(temperature, 0x1p-100F), 0x1p100F));
        farthest = __fdiv_rn(-OCTAVES, scale);
    }

    // Smaller logits have no weight.
    __device__ inline float bottom() const { return __fadd_rn(largest, farthest); }
};

// A sum of weights, in two parts that take one register each: units of 2^22, and single units,
// which may be less than none. At most 256 weights fit.
struct Parts {
    unsigned high = 0;
    unsigned low = 0;

    __device__ inline void add(const Parts &other) {
        high += other.high;
        low += other.low;
    }
    __device__ inline unsigned long long whole() const {
        const long long units = static_cast<int>(low);
        return (static_cast<unsigned long long>(high) << 22) +
               static_cast<unsigned long long>(units);
    }
};

// The weight of a token. What is not a number has none, and neither has minus infinity.
__device__ inline Parts weight(const Weights &weights, float logit) {
    const float distance = fmaxf(__fadd_rn(logit, -weights.largest), weights.farthest);
    // A power of two is one of an integer, and one of what is left, which a polynomial gives within
    // 5e-7.
    const float integer = __fmaf_rn(distance, weights.scale, ROUNDS);
    const float left = __fmaf_rn(distance, weights.scale, -__fadd_rn(integer, -ROUNDS));
    float power = __fmaf_rn(left, 0.00111255073F, 0.00966628268F);
    power = __fmaf_rn(left, power, 0.0555740036F);
    power = __fmaf_rn(left, power, 0.240223512F);
    power = __fmaf_rn(left, power, 0.693142831F);
    power = __fmaf_rn(left, power, 1.0F);
    power = __uint_as_float(__float_as_uint(power) + (__float_as_uint(integer) << 23));
    // It is at most 1. So a sum with 1 has it in units of 2^-23, and what is left goes the same
    // way.
    const float high = __fadd_rn(power, 1.0F);
    const float rest = __fadd_rn(power, -__fadd_rn(high, -1.0F));
    const float low = __fmaf_rn(rest, 0x1p22F, 1.5F);
    Parts parts;
    parts.high = __float_as_uint(high) - 0x3f800000;
    parts.low = __float_as_uint(low) - 0x3fc00000;
    return parts;
}

// The mass that the most likely tokens must have, for `p` below 1: `p` of the whole, rounded up.
__device__ inline unsigned long long target(float p, unsigned long long whole) {
    const auto ratio = static_cast<unsigned long long>(fmaxf(p, 0.0F) * 0x1p64F);
    const unsigned long long least = __umul64hi(whole, ratio) + (whole * ratio != 0 ? 1 : 0);
    return least == 0 ? 1 : least;
}

// An integer for a number, in the same order.
__device__ inline unsigned ordered(float number) {
    const unsigned bits = __float_as_uint(number);
    return bits ^ (bits >> 31 != 0 ? 0xffffffff : 0x80000000);
}
__device__ inline float number_of(unsigned ordered) {
    return __uint_as_float(ordered ^ (ordered >> 31 != 0 ? 0x80000000 : 0xffffffff));
}

// 64 random bits for a seed and a position: Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel
// random numbers: as easy as 1, 2, 3", 2011), with the seed as the key.
__device__ inline unsigned long long random_bits(unsigned seed_low, unsigned seed_high,
                                                 unsigned position) {
    unsigned counter[4] = {position, 0, 0, 0};
#pragma unroll
    for (unsigned round = 0; round < 10; ++round) {
        const unsigned high_0 = __umulhi(0xd2511f53, counter[0]), low_0 = 0xd2511f53 * counter[0];
        const unsigned high_1 = __umulhi(0xcd9e8d57, counter[2]), low_1 = 0xcd9e8d57 * counter[2];
        counter[0] = high_1 ^ counter[1] ^ seed_low;
        counter[1] = low_1;
        counter[2] = high_0 ^ counter[3] ^ seed_high;
        counter[3] = low_0;
        seed_low += 0x9e3779b9;
        seed_high += 0xbb67ae85;
    }
    return static_cast<unsigned long long>(counter[1]) << 32 | counter[0];
}

} // namespace sampling
