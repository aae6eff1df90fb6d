// Which part of the rows of K and V a lane holds in registers.
//
// All loads are of 16 bytes, as long as the rows' length permits. The lanes that share a row take
// its units in turn, so what they load at once lies side by side.
#pragma once
#include "schedule.cuh"

namespace attention {

constexpr unsigned UNIT_BYTES = 16;

// The rows of a tile in memory.
struct Place {
    bool is_there;
    // Of the first row.
    unsigned key;
    const char *k;
    const char *v;
};

// The part of a row that one of `SHARERS` lanes holds.
template <unsigned ROW_BYTES, unsigned SHARERS> struct Share {
    static constexpr unsigned REGISTERS = ROW_BYTES / SHARERS / 4;
    // Registers in whole units. The rest is a half of a unit, a quarter, or both.
    static constexpr unsigned OF_UNITS = REGISTERS / 4 * 4;
    static constexpr unsigned OF_HALVES = OF_UNITS + REGISTERS % 4 / 2 * 2;

    // Where in the row the bytes of a register lie.
    static __device__ unsigned offset(unsigned at, unsigned sharer) {
        // There may be no whole units.
        if (at / 4 + 1 <= OF_UNITS / 4) {
            return at / 4 * SHARERS * 16 + sharer * 16 + at % 4 * 4;
        }
        if (at < OF_HALVES) {
            return OF_UNITS * SHARERS * 4 + sharer * 8 + (at - OF_UNITS) * 4;
        }
        return OF_HALVES * SHARERS * 4 + sharer * 4;
    }

    // Loads the share of a row of which `bytes` exist, a multiple of 16. The rest becomes 0.
    static __device__ void load(unsigned (&to)[REGISTERS], const char *row, unsigned sharer,
                                unsigned bytes) {
#pragma unroll
        for (unsigned at = 0; at != OF_UNITS; at += 4) {
            const unsigned from = offset(at, sharer);
            attention::load<4>(to + at, row + from, from < bytes);
        }
        if constexpr (OF_HALVES > OF_UNITS) {
            const unsigned from = offset(OF_UNITS, sharer);
            attention::load<2>(to + OF_UNITS, row + from, from < bytes);
        }
        if constexpr (REGISTERS > OF_HALVES) {
            const unsigned from = offset(OF_HALVES, sharer);
            attention::load<1>(to + OF_HALVES, row + from, from < bytes);
        }
    }
};

} // namespace attention
