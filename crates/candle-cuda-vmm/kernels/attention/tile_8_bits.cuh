// A warp's attention over tiles of K and V of F8E4M3, which become F16 or BF16 in registers. Both
// types have all numbers of F8E4M3.
//
// The order of the dims in a product does not matter if both sides have the same, nor does that of
// the sums until they are stored. So a lane takes dims that lie side by side.
#pragma once
#include "tile_16_bits.cuh"
#include <cuda_fp8.h>

namespace attention {

// Two numbers of 8 bits, the first in the low half of each.
__device__ inline unsigned wide_pair(unsigned short pair, __half) {
    const __half2_raw both = __nv_cvt_fp8x2_to_halfraw2(pair, __NV_E4M3);
    return both.x | static_cast<unsigned>(both.y) << 16;
}
__device__ inline unsigned wide_pair(unsigned short pair, __nv_bfloat16) {
    const float2 both = __half22float2(__half2(__nv_cvt_fp8x2_to_halfraw2(pair, __NV_E4M3)));
    return packed(both.x, both.y, __nv_bfloat16());
}

template <typename M, unsigned K_DIM, unsigned V_DIM> struct Tile8Bits {
    using Element = __nv_fp8_e4m3;
    using Query = M;
    unsigned queries[K_DIM / 16][2];
    Products<M, V_DIM> products;

    __device__ void begin(const M *rows, unsigned heads, const Arguments &given) {
        products.clear();
        const unsigned quarter = lane_index() % 4;
        load_queries(queries, rows, heads, given.cache.k.dim, [=](unsigned at, unsigned half) {
            return 16 * at + 4 * quarter + 2 * half;
        });
    }

    __device__ void add(const char *k, const char *v, unsigned key, const Sequence &sequence,
                        const Arguments &given) {
        float even[4] = {}, odd[4] = {};
        const unsigned row = lane_index() / 4;
        const unsigned quarter = lane_index() % 4;
        constexpr unsigned K_BYTES = Row<Element, K_DIM>::BYTES;
#pragma unroll
        for (unsigned at = 0; at < K_DIM / 16; ++at) {
            const char *from = k + row * K_BYTES + 16 * at + 4 * quarter;
            const unsigned upper = *reinterpret_cast<const unsigned *>(from);
            const unsigned lower = *reinterpret_cast<const unsigned *>(from + 8 * K_BYTES);
            const unsigned keys[4] = {
                wide_pair(static_cast<unsigned short>(upper), M()),
                wide_pair(static_cast<unsigned short>(lower), M()),
                wide_pair(static_cast<unsigned short>(upper >> 16), M()),
                wide_pair(static_cast<unsigned short>(lower >> 16), M()),
            };
            multiply(at % 2 == 0 ? even : odd, keys, queries[at], M());
        }
        for (unsigned number = 0; number < 4; ++number) {
            even[number] += odd[number];
        }
        unsigned powers[2];
        products.weigh(even, powers, key, sequence, given);
        constexpr unsigned V_BYTES = Row<Element, V_DIM>::BYTES;
#pragma unroll
        for (unsigned at = 0; at < V_DIM / 32; ++at) {
            // Four dims of the keys 2 * quarter and the next, and of those eight keys further.
            const char *from = v + 2 * quarter * V_BYTES + 32 * at + 4 * row;
            unsigned of_keys[4];
            for (unsigned which = 0; which < 4; ++which) {
                const unsigned offset = (which % 2 + which / 2 * 8) * V_BYTES;
                of_keys[which] = *reinterpret_cast<const unsigned *>(from + offset);
            }
#pragma unroll
            for (unsigned half = 0; half < 2; ++half) {
                unsigned pairs[4];
                for (unsigned which = 0; which < 4; ++which) {
                    const unsigned two = of_keys[which] >> 16 * half;
                    pairs[which] = wide_pair(static_cast<unsigned short>(two), M());
                }
                // From two dims of one key to two keys of one dim.
                const unsigned values[4] = {
                    __byte_perm(pairs[0], pairs[1], 0x5410),
                    __byte_perm(pairs[0], pairs[1], 0x7632),
                    __byte_perm(pairs[2], pairs[3], 0x5410),
                    __byte_perm(pairs[2], pairs[3], 0x7632),
                };
                multiply(products.sums[2 * at + half], values, powers, M());
            }
        }
    }

    __device__ void store(Partial<V_DIM> &to, unsigned /* heads */) const {
        products.store_by(to, [](unsigned at, unsigned row, unsigned lower) {
            return 32 * (at / 2) + 4 * row + 2 * (at % 2) + lower;
        });
    }
};

} // namespace attention
