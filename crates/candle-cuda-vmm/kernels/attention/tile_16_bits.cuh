// A warp's attention over tiles of K and V of F16 or BF16, by matrix instructions.
//
// The heads are the narrow side of the products: scores = K * queries, 16 keys by 8 heads, and
// sums = transposed V * powers, 16 dims by 8 heads. So few heads waste little. The sums of two
// heads are in one lane, as are their maxima.
#pragma once
#include "loads.cuh"
#include "softmax.cuh"

namespace attention {

// What the tiles of 16 and of 8 bits have in common. `M` is the type that is multiplied.
template <typename M, unsigned V_DIM> struct Products {
    // For each 16 dims a fragment of sums.
    float sums[V_DIM / 16][4];
    // Of the heads `pair` and `pair + 1`.
    Running running[2];

    __device__ void clear() {
        for (unsigned at = 0; at < V_DIM / 16; ++at) {
            for (unsigned number = 0; number < 4; ++number) {
                sums[at][number] = 0.0F;
            }
        }
        running[0].clear(), running[1].clear();
    }

    // Turns products into powers, as a right fragment, and scales the sums to the new maxima. `key`
    // is the tile's first.
    __device__ void weigh(float (&scores)[4], unsigned (&powers)[2], unsigned key,
                          const Sequence &sequence, const Arguments &given) {
        for (unsigned number = 0; number < 4; ++number) {
            const unsigned own = key + lane_index() / 4 + number / 2 * 8;
            const bool is_seen = own >= sequence.start && own < sequence.end;
            scores[number] = is_seen ? score(scores[number], given) : minus_infinity();
        }
        for (unsigned head = 0; head < 2; ++head) {
            const float own = fmaxf(scores[head], scores[head + 2]);
            // Over the lanes of the same heads.
            const float max = largest<0b11100>(own);
            const float factor = running[head].raise(fmaxf(running[head].max, max));
            for (unsigned at = 0; at < V_DIM / 16; ++at) {
                sums[at][head] *= factor;
                sums[at][head + 2] *= factor;
            }
            scores[head] = running[head].add(scores[head]);
            scores[head + 2] = running[head].add(scores[head + 2]);
        }
        powers[0] = transposed(packed(scores[0], scores[1], M()));
        powers[1] = transposed(packed(scores[2], scores[3], M()));
    }

    // `dim_of` names the dim of a fragment's upper or lower row.
    template <typename DimOf> __device__ void store_by(Partial<V_DIM> &to, DimOf dim_of) const {
        const unsigned row = lane_index() / 4;
        const unsigned pair = lane_index() % 4 * 2;
        for (unsigned head = 0; head < 2; ++head) {
            for (unsigned at = 0; at < V_DIM / 16; ++at) {
                to.sums[pair + head][dim_of(at, row, 0)] = sums[at][head];
                to.sums[pair + head][dim_of(at, row, 1)] = sums[at][head + 2];
            }
            const float total = sum<0b11100>(running[head].total);
            if (row == 0) {
                to.max[pair + head] = running[head].max;
                to.total[pair + head] = total;
            }
        }
    }
};

// Loads the queries of `heads` heads as right fragments, with zeros for others. `dim_of` names the
// first of the two dims of a register.
template <unsigned FRAGMENTS, typename Q, typename DimOf>
__device__ inline void load_queries(unsigned (&to)[FRAGMENTS][2], const Q *rows, unsigned heads,
                                    unsigned dims, DimOf dim_of) {
    const unsigned head = lane_index() / 4;
    for (unsigned at = 0; at < FRAGMENTS; ++at) {
        for (unsigned half = 0; half < 2; ++half) {
            const unsigned dim = dim_of(at, half);
            const bool is_there = head < heads && dim < dims;
            const Q *place = rows + head * dims + dim;
            to[at][half] = is_there ? *reinterpret_cast<const unsigned *>(place) : 0;
        }
    }
}

template <typename E, unsigned K_DIM, unsigned V_DIM> struct Tile16Bits {
    using Element = E;
    using Query = E;
    // For each 16 dims a right fragment.
    unsigned queries[K_DIM / 16][2];
    Products<E, V_DIM> products;

    __device__ void begin(const E *rows, unsigned heads, const Arguments &given) {
        products.clear();
        const unsigned pair = lane_index() % 4 * 2;
        load_queries(queries, rows, heads, given.cache.k.dim, [=](unsigned at, unsigned half) {
            return 16 * at + 8 * half + pair;
        });
    }

    __device__ void add(const char *k, const char *v, unsigned key, const Sequence &sequence,
                        const Arguments &given) {
        // Two, so that a product need not wait for the one before it.
        float even[4] = {}, odd[4] = {};
        const unsigned lane = lane_index();
        const char *from = k + lane % 16 * Row<E, K_DIM>::BYTES + lane / 16 * UNIT_BYTES;
#pragma unroll
        for (unsigned at = 0; at < K_DIM / 16; ++at) {
            unsigned keys[4];
            load_left(keys, from + at * 2 * UNIT_BYTES);
            multiply(at % 2 == 0 ? even : odd, keys, queries[at], E());
        }
        for (unsigned number = 0; number < 4; ++number) {
            even[number] += odd[number];
        }
        unsigned powers[2];
        products.weigh(even, powers, key, sequence, given);
        from = v + (lane % 8 + lane / 16 * 8) * Row<E, V_DIM>::BYTES + lane / 8 % 2 * UNIT_BYTES;
#pragma unroll
        for (unsigned at = 0; at < V_DIM / 16; ++at) {
            unsigned values[4];
            load_left_transposed(values, from + at * 2 * UNIT_BYTES);
            multiply(products.sums[at], values, powers, E());
        }
    }

    __device__ void store(Partial<V_DIM> &to, unsigned /* heads */) const {
        products.store_by(to, [](unsigned at, unsigned row, unsigned lower) {
            return 16 * at + row + 8 * lower;
        });
    }
};

} // namespace attention
