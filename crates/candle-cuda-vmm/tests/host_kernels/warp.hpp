// The functions of `kernels/attention/warp.cuh` that are instructions of a GPU.
#pragma once
#include "cuda.hpp"

namespace attention {

template <unsigned COUNT> void load(unsigned *to, const char *from, bool valid) {
    CHECK(!valid || reinterpret_cast<size_t>(from) % (4 * COUNT) == 0);
    std::memset(to, 0, 4 * COUNT);
    if (valid) {
        std::memcpy(to, from, 4 * COUNT);
    }
}

inline void wait_for_earlier_kernels() {}

// A copy happens when it is waited for, so who reads before finds what was there.
inline void copy_4_bytes(void *to, const void *from, bool valid) {
    CHECK(reinterpret_cast<size_t>(to) % 4 == 0 && reinterpret_cast<size_t>(from) % 4 == 0);
    host::current->copies.push_back([=] {
        valid ? std::memcpy(to, from, 4) : std::memset(to, 0, 4);
    });
}

inline void wait_for_copies() {
    for (const auto &copy : host::current->copies) {
        copy();
    }
    host::current->copies.clear();
}

inline unsigned count_in_order(unsigned *to) { return (*to)++; }

inline float power_of_2(float exponent) { return exp2f(exponent); }

template <typename M> float element(unsigned long long pair, unsigned half, M) {
    const auto bits = static_cast<unsigned short>(pair >> 16 * half);
    return static_cast<float>(reinterpret_cast<const M &>(bits));
}

template <typename M>
void multiply(float (&sums)[4], const unsigned (&left)[4], const unsigned (&right)[2], M type) {
    auto &given = host::warp().given;
    const unsigned lane = host::lane();
    std::copy(left, left + 4, given[lane]);
    std::copy(right, right + 2, given[lane] + 4);
    host::meet_warp();
    for (unsigned number = 0; number < 4; ++number) {
        const unsigned row = lane / 4 + number / 2 * 8;
        const unsigned column = lane % 4 * 2 + number % 2;
        double sum = sums[number];
        for (unsigned at = 0; at < 16; ++at) {
            const unsigned left_register = row / 8 + at / 8 * 2;
            const unsigned left_lane = row % 8 * 4 + at % 8 / 2;
            const unsigned right_lane = column * 4 + at % 8 / 2;
            const double l = element(given[left_lane][left_register], at % 2, type);
            const double r = element(given[right_lane][4 + at / 8], at % 2, type);
            sum += l * r;
        }
        sums[number] = static_cast<float>(sum);
    }
    host::meet_warp();
}

} // namespace attention
