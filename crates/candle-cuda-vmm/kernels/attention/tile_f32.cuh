// A warp's attention over tiles of K and V of F32, by ordinary arithmetic, so that nothing is
// rounded to fewer bits.
//
// For the scores a lane takes half of the dims of one key; for the sums every 32nd dim of all keys.
#pragma once
#include "merge.cuh"
#include "rows.cuh"

namespace attention {

template <unsigned K_DIM, unsigned V_DIM> struct TileF32 {
    using Query = float;
    struct Shared {};
    // The next tile.
    Place place;
    const float4 *rows;
    unsigned heads;
    float sums[HEADS][V_DIM / LANES];
    // `total` is of this lane's key.
    Running running[HEADS];

    __device__ void fetch(Shared & /* shared */, const float * /* queries */, unsigned /* count */,
                          const Arguments & /* given */) {}

    __device__ void begin(const float *queries, unsigned count) {
        rows = reinterpret_cast<const float4 *>(queries);
        heads = count;
        for (unsigned head = 0; head < HEADS; ++head) {
            running[head].clear();
            for (unsigned at = 0; at < V_DIM / LANES; ++at) {
                sums[head][at] = 0.0F;
            }
        }
    }

    // Nothing is loaded before it is added: other warps' work hides the time.
    __device__ void load(const Place &next, const Sequence & /* sequence */,
                         const Arguments & /* given */) {
        place = next;
    }

    __device__ void add(const Shared & /* shared */, const Place &next, const Sequence &sequence,
                        const Arguments &given) {
        const unsigned own = lane_index() % TILE;
        const unsigned half = lane_index() / TILE;
        const bool is_seen = sequence.sees(place.key + own);
        const bool is_read = is_seen && place.k != nullptr;
        constexpr unsigned HALF_UNITS = K_DIM / 8;
        const char *units = place.k + 1ULL * own * given.cache.k.token_bytes;
        float scores[HEADS] = {};
#pragma unroll 4
        for (unsigned at = half * HALF_UNITS; at < (half + 1) * HALF_UNITS; ++at) {
            const bool is_there = at < given.cache.k.units;
            unsigned left[4];
            attention::load<4>(left, units + at * UNIT_BYTES, is_read && is_there);
#pragma unroll
            for (unsigned head = 0; head < HEADS; ++head) {
                if (head < heads && is_there) {
                    const float4 right = __ldg(rows + head * given.cache.k.units + at);
                    scores[head] += __int_as_float(left[0]) * right.x +
                                    __int_as_float(left[1]) * right.y +
                                    __int_as_float(left[2]) * right.z +
                                    __int_as_float(left[3]) * right.w;
                }
            }
        }
#pragma unroll
        for (unsigned head = 0; head < HEADS; ++head) {
            if (head < heads) {
                scores[head] = sum<TILE>(scores[head]);
            }
        }
        score(scores, given);
#pragma unroll
        for (unsigned head = 0; head < HEADS; ++head) {
            if (head < heads) {
                scores[head] = is_seen ? scores[head] : minus_infinity();
                const float max = largest<TILE - 1>(scores[head]);
                const float factor = running[head].raise(fmaxf(running[head].max, max));
                for (unsigned at = 0; at < V_DIM / LANES; ++at) {
                    sums[head][at] *= factor;
                }
                scores[head] = running[head].add(scores[head]);
            }
        }
#pragma unroll 4
        for (unsigned row = 0; row < TILE; ++row) {
            const bool is_row_read = sequence.sees(place.key + row) && place.k != nullptr;
            const char *values = place.v + 1ULL * row * given.cache.v.token_bytes;
            unsigned own_values[V_DIM / LANES];
            for (unsigned at = 0; at < V_DIM / LANES; ++at) {
                const unsigned dim = at * LANES + lane_index();
                attention::load<1>(own_values + at, values + dim * sizeof(float),
                                   is_row_read && dim < given.cache.v.dim);
            }
#pragma unroll
            for (unsigned head = 0; head < HEADS; ++head) {
                if (head < heads) {
                    const float power = __shfl_sync(ALL_LANES, scores[head], row);
                    for (unsigned at = 0; at < V_DIM / LANES; ++at) {
                        sums[head][at] += power * __int_as_float(own_values[at]);
                    }
                }
            }
        }
        place = next;
    }

    __device__ void store_max(float (&to)[HEADS]) const {
        for (unsigned head = 0; head < HEADS; ++head) {
            if (lane_index() == 0) {
                to[head] = running[head].max;
            }
        }
    }

    // Stores what the warp has, relative to the largest of all warps.
    __device__ void store(OfWarps<V_DIM> &to, unsigned warp, unsigned warps) {
        Partial<V_DIM> &partial = to.partials[warp];
#pragma unroll
        for (unsigned head = 0; head < HEADS; ++head) {
            const float factor = running[head].raise(to.max_of(head, warps));
            for (unsigned at = 0; at < V_DIM / LANES; ++at) {
                partial.sums[head][at * LANES + lane_index()] = sums[head][at] * factor;
            }
            const float total = sum<TILE - 1>(running[head].total);
            if (lane_index() == 0) {
                partial.softmax[head].total = total;
            }
        }
    }
};

} // namespace attention
