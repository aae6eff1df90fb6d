// The functions of `kernels/attention/warp.cuh` that are instructions of a GPU.
#pragma once
#include "cuda.hpp"

namespace attention {

inline void copy_16_bytes(void *to, const void *from, bool valid) {
    CHECK(reinterpret_cast<size_t>(to) % 16 == 0);
    CHECK(!valid || reinterpret_cast<size_t>(from) % 16 == 0);
    host::current->open.push_back({to, from, valid});
}

inline void end_group() {
    host::current->groups.push_back(host::current->open);
    host::current->open.clear();
}

template <unsigned PENDING> void wait_for_groups() {
    auto &groups = host::current->groups;
    for (; groups.size() > PENDING; groups.erase(groups.begin())) {
        for (const host::Copy &copy : groups.front()) {
            if (copy.valid) {
                std::memcpy(copy.to, copy.from, 16);
            } else {
                std::memset(copy.to, 0, 16);
            }
        }
    }
}

// Four matrices of 8 by 8 elements of 16 bits. The lanes name their rows, eight after eight.
inline void load_matrices(unsigned (&to)[4], const void *from, bool is_transposed) {
    CHECK(reinterpret_cast<size_t>(from) % 16 == 0);
    auto &given = host::warp().given;
    const unsigned lane = host::lane();
    given[lane][0] = reinterpret_cast<unsigned long long>(from);
    host::meet_warp();
    for (unsigned matrix = 0; matrix < 4; ++matrix) {
        to[matrix] = 0;
        for (unsigned half = 0; half < 2; ++half) {
            unsigned row = lane / 4;
            unsigned column = lane % 4 * 2 + half;
            if (is_transposed) {
                std::swap(row, column);
            }
            const auto *elements =
                reinterpret_cast<const unsigned short *>(given[8 * matrix + row][0]);
            to[matrix] |= static_cast<unsigned>(elements[column]) << 16 * half;
        }
    }
    host::meet_warp();
}

inline void load_left(unsigned (&to)[4], const void *from) { load_matrices(to, from, false); }
inline void load_left_transposed(unsigned (&to)[4], const void *from) {
    load_matrices(to, from, true);
}

inline unsigned transposed(unsigned own) {
    auto &given = host::warp().given;
    const unsigned lane = host::lane();
    given[lane][0] = own;
    host::meet_warp();
    unsigned result = 0;
    for (unsigned half = 0; half < 2; ++half) {
        const unsigned row = lane % 4 * 2 + half;
        const unsigned column = lane / 4;
        const unsigned long long pair = given[row * 4 + column / 2][0];
        result |= static_cast<unsigned>(pair >> 16 * (column % 2) & 0xffff) << 16 * half;
    }
    host::meet_warp();
    return result;
}

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
