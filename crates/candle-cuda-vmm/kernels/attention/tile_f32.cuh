// A warp's attention over tiles of K and V of F32, by ordinary arithmetic, so that nothing is
// rounded to fewer bits.
//
// For the scores a lane takes half of the dims of one key; for the sums every 32nd dim of all keys.
#pragma once
#include "loads.cuh"
#include "softmax.cuh"

namespace attention {

template <unsigned K_DIM, unsigned V_DIM> struct TileF32 {
    using Element = float;
    using Query = float;
    const float4 *rows;
    unsigned heads;
    float sums[HEADS][V_DIM / LANES];
    // `total` is of this lane's key.
    Running running[HEADS];

    __device__ void begin(const float *queries, unsigned count, const Arguments & /* given */) {
        rows = reinterpret_cast<const float4 *>(queries);
        heads = count;
        for (unsigned head = 0; head < HEADS; ++head) {
            running[head].clear();
            for (unsigned at = 0; at < V_DIM / LANES; ++at) {
                sums[head][at] = 0.0F;
            }
        }
    }

    __device__ void add(const char *k, const char *v, unsigned key, const Sequence &sequence,
                        const Arguments &given) {
        const unsigned own = lane_index() % TILE;
        const unsigned half = lane_index() / TILE;
        constexpr unsigned HALF_UNITS = Row<float, K_DIM>::UNITS / 2;
        const auto *units = reinterpret_cast<const float4 *>(k + own * Row<float, K_DIM>::BYTES);
        float scores[HEADS] = {};
#pragma unroll 4
        for (unsigned at = half * HALF_UNITS; at < (half + 1) * HALF_UNITS; ++at) {
            if (at >= given.cache.k.units) {
                break;
            }
            const float4 left = units[at];
#pragma unroll
            for (unsigned head = 0; head < HEADS; ++head) {
                if (head < heads) {
                    const float4 right = __ldg(rows + head * given.cache.k.units + at);
                    scores[head] += left.x * right.x + left.y * right.y + left.z * right.z +
                                    left.w * right.w;
                }
            }
        }
        const bool is_seen = key + own >= sequence.start && key + own < sequence.end;
#pragma unroll
        for (unsigned head = 0; head < HEADS; ++head) {
            if (head < heads) {
                const float product = sum<TILE>(scores[head]);
                scores[head] = is_seen ? score(product, given) : minus_infinity();
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
            const auto *values = reinterpret_cast<const float *>(v + row * Row<float, V_DIM>::BYTES);
            float own_values[V_DIM / LANES];
            for (unsigned at = 0; at < V_DIM / LANES; ++at) {
                own_values[at] = values[at * LANES + lane_index()];
            }
#pragma unroll
            for (unsigned head = 0; head < HEADS; ++head) {
                if (head < heads) {
                    const float power = __shfl_sync(ALL_LANES, scores[head], row);
                    for (unsigned at = 0; at < V_DIM / LANES; ++at) {
                        sums[head][at] += power * own_values[at];
                    }
                }
            }
        }
    }

    __device__ void store(Partial<V_DIM> &to, unsigned /* heads */) const {
#pragma unroll
        for (unsigned head = 0; head < HEADS; ++head) {
            for (unsigned at = 0; at < V_DIM / LANES; ++at) {
                to.sums[head][at * LANES + lane_index()] = sums[head][at];
            }
            const float total = sum<TILE - 1>(running[head].total);
            if (lane_index() == 0) {
                to.max[head] = running[head].max;
                to.total[head] = total;
            }
        }
    }
};

} // namespace attention
