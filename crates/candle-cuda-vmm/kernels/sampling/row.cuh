// A row of a block: how its pieces are visited, weighed and chosen from.
#pragma once
#include "../rows.cuh"
#include "block.cuh"
#include "weights.cuh"

namespace sampling {

using attention::wide;
using rows::Piece;

// Pieces that a thread loads at once: to look at them, and to weigh them, which takes registers.
constexpr unsigned SEEN = 4;
constexpr unsigned WEIGHED = 2;
// Added to a number below 2^23, it leaves the nearest integer in the low bits.
constexpr float FIRST_BIN = 8388608.0F;

// Bins of logits below the largest, all of a width.
struct Bins {
    float largest;
    // Bins of a unit of logits, negative.
    float scale;
    // Octaves of weight in a bin.
    float width;

    // Tokens with less weight than those of all bins have together less than the mass that may be
    // left out, or next to none.
    __device__ inline Bins(const Weights &weights, float p, unsigned size)
        : largest(weights.largest) {
        const float least = log2f(static_cast<float>(size) / fmaxf(1.0F - p, 0x1p-24F)) + 1.0F;
        width = fminf(least, 46.0F) / static_cast<float>(BINS - 2);
        scale = -weights.scale / width;
    }
    // The number of a logit's bin, plus `FIRST_BIN`. It does not fall as logits fall. It is not a
    // number if the logit is none.
    __device__ inline float place(float logit) const {
        return __fmaf_rn(__fadd_rn(logit, -largest), scale, FIRST_BIN);
    }
};

// Places of bins: the tokens before the first are in the set for certain, and those from the last
// on are not.
struct Between {
    float first, last;
};

// A row of a block. Each warp has a part of it: pieces that lie side by side.
template <typename T, unsigned COUNT> struct Row {
    using P = Piece<T, COUNT>;

    const P *pieces;
    unsigned count;

    __device__ inline unsigned begin(unsigned warp) const {
        return count * warp / (blockDim.x / LANES);
    }

    // Calls `each` with the pieces of this thread, and their numbers, in their order.
    template <unsigned HELD, typename Each> __device__ inline void for_each(Each each) const {
        const unsigned end = begin(warp_index() + 1);
        unsigned at = begin(warp_index()) + attention::lane_index();
        for (; at < end; at += HELD * LANES) {
            // All loads are under way before the first is waited for.
            P held[HELD];
#pragma unroll
            for (unsigned turn = 0; turn < HELD; ++turn) {
                held[turn] = pieces[min(at + turn * LANES, count - 1)];
            }
#pragma unroll
            for (unsigned turn = 0; turn < HELD; ++turn) {
                if (at + turn * LANES < end) {
                    each(at + turn * LANES, held[turn]);
                }
            }
        }
    }

    static __device__ inline bool has_any(const P &piece, float least) {
        bool any = false;
#pragma unroll
        for (unsigned at = 0; at < COUNT; ++at) {
            any |= wide(piece.elements[at]) >= least;
        }
        return any;
    }

    // The weight of a piece's tokens whose logits are at least this.
    static __device__ inline Mass mass(const P &piece, const Weights &weights, float least) {
        Parts parts;
        if (has_any(piece, least)) {
#pragma unroll
            for (unsigned at = 0; at < COUNT; ++at) {
                const float logit = wide(piece.elements[at]);
                const Parts own = weight(weights, logit);
                parts.add(logit >= least ? own : Parts{});
            }
        }
        return parts.whole();
    }

    // The first of the largest logits, and the piece that it is in.
    __device__ inline float find_largest(Shared &shared, unsigned &piece) const {
        float best = -INFINITY;
        unsigned best_at = ~0U;
        for_each<SEEN>([&](unsigned at, const P &own) {
            float of_piece = -INFINITY;
#pragma unroll
            for (unsigned each = 0; each < COUNT; ++each) {
                of_piece = fmaxf(of_piece, wide(own.elements[each]));
            }
            if (of_piece > best) {
                best = of_piece;
                best_at = at;
            }
        });
        // Zeros of both signs are equal.
        const Mass key = static_cast<Mass>(ordered(best + 0.0F)) << 32 | ~best_at;
        const Mass found = largest(shared, key);
        piece = ~static_cast<unsigned>(found);
        return number_of(static_cast<unsigned>(found >> 32));
    }

    // The first of a piece's elements that is the largest.
    __device__ inline unsigned first_of(unsigned at, float logit) const {
        const P piece = pieces[at];
        unsigned each = 0;
        while (each + 1 < COUNT && wide(piece.elements[each]) != logit) {
            ++each;
        }
        return each;
    }

    // The bins in which the set's smallest logit is.
    __device__ inline Between count_bins(Shared &shared, const Bins &bins, float p) const {
        for (unsigned at = threadIdx.x; at < BINS; at += blockDim.x) {
            shared.bins[at] = 0;
        }
        __syncthreads();
        for_each<SEEN>([&](unsigned, const P &own) {
#pragma unroll
            for (unsigned each = 0; each < COUNT; ++each) {
                const float place = bins.place(wide(own.elements[each]));
                if (place <= FIRST_BIN + (BINS - 1)) {
                    const unsigned bin = __float_as_uint(place) - __float_as_uint(FIRST_BIN);
                    atomicAdd(&shared.bins[bin], 1U);
                }
            }
        });
        __syncthreads();
        // Each thread has bins that lie side by side.
        const unsigned share = (BINS + blockDim.x - 1) / blockDim.x;
        const auto for_bins = [&](auto each) {
            for (unsigned turn = 0; turn < share; ++turn) {
                const unsigned bin = threadIdx.x * share + turn;
                if (bin < BINS) {
                    const float tokens = static_cast<float>(shared.bins[bin]);
                    each(bin, tokens * exp2f(-bins.width * static_cast<float>(bin)));
                }
            }
        };
        // As if all tokens of a bin had the weight of its middle.
        float own = 0.0F;
        for_bins([&](unsigned, float mass) { own += mass; });
        const auto before = sum_before(shared, own);
        const float rest =
            static_cast<float>(count * COUNT) * exp2f(-bins.width * static_cast<float>(BINS - 2));
        Mass certain = 0, complete = 0;
        // They have up to half of a bin more or less. If that leaves too many tokens between, less
        // is assumed: in many bins tokens are on both sides.
        for (float margin = 0.5F; margin > 0.01F; margin *= 0.125F) {
            const float tilt = exp2f(2.0F * margin * bins.width) * 1.00001F;
            const float least = p * before.all / tilt;
            const float most = p * (before.all + rest) * tilt;
            // Bins that are in the set for certain, and those with which it is complete.
            Mass own_bins = 0;
            float so_far = before.own;
            for_bins([&](unsigned, float mass) {
                so_far += mass;
                own_bins += so_far < least ? 1 : 0;
                own_bins += so_far < most ? 1ULL << 32 : 0;
            });
            own_bins = sum(shared, own_bins);
            certain = own_bins & 0xffffffff;
            complete = (own_bins >> 32) + 1;
            Mass tokens = 0;
            for_bins([&](unsigned bin, float) {
                tokens += bin >= certain && bin < complete ? shared.bins[bin] : 0;
            });
            if (sum(shared, tokens) <= LISTED) {
                break;
            }
        }
        return {FIRST_BIN + static_cast<float>(certain), FIRST_BIN + static_cast<float>(complete)};
    }

    // Sums up the weights of all tokens, and of those before the bins between, which also go to
    // the masses of the warps. The tokens of the bins between go to the list.
    __device__ inline Mass weigh(Shared &shared, const Weights &weights, const Bins &bins,
                                 Between between, Mass &certain) const {
        const float bottom = weights.bottom();
        Mass all = 0, own_certain = 0;
        for_each<WEIGHED>([&](unsigned, const P &own) {
            if (!has_any(own, bottom)) {
                return;
            }
            Parts parts, parts_certain;
            unsigned listed = 0;
#pragma unroll
            for (unsigned each = 0; each < COUNT; ++each) {
                const float logit = wide(own.elements[each]);
                const Parts part = weight(weights, logit);
                const float place = bins.place(logit);
                parts.add(part);
                parts_certain.add(place < between.first ? part : Parts{});
                listed |= (place >= between.first && place < between.last ? 1U : 0U) << each;
            }
            all += parts.whole();
            own_certain += parts_certain.whole();
            if (listed != 0) {
                list(shared, own, listed);
            }
        });
        certain = set_masses(shared, own_certain);
        return sum(shared, all);
    }

    // Puts tokens of a piece on the list, in any order, as far as there is room.
    static __device__ inline void list(Shared &shared, const P &piece, unsigned listed) {
        // It may be more already. Then it does not matter how much.
        if (*const_cast<volatile unsigned *>(&shared.length) > LISTED) {
            return;
        }
        unsigned to = atomicAdd(&shared.length, static_cast<unsigned>(__popc(listed)));
#pragma unroll
        for (unsigned each = 0; each < COUNT; ++each) {
            if ((listed >> each & 1) != 0) {
                if (to < LISTED) {
                    shared.list[to] = wide(piece.elements[each]);
                    shared.list_warps[to] = static_cast<unsigned char>(warp_index());
                }
                ++to;
            }
        }
    }

    // Sets the masses of the warps, and returns their sum.
    static __device__ inline Mass set_masses(Shared &shared, Mass own) {
        const Mass of_warp = __shfl_sync(ALL_LANES, sum_so_far(own), LANES - 1);
        if (attention::lane_index() == 0) {
            shared.masses[warp_index()] = of_warp;
        }
        return sum(shared, own);
    }

    // Draws the token at which the masses in the order of tokens reach beyond `drawn`.
    __device__ inline void pick(Shared &shared, const Weights &weights, float least, Mass drawn,
                                unsigned *token) const {
        const unsigned lane = attention::lane_index();
        const Mass of_warp = lane < blockDim.x / LANES ? shared.masses[lane] : 0;
        const Mass so_far = sum_so_far(of_warp);
        const auto warp =
            static_cast<unsigned>(__ffs(__ballot_sync(ALL_LANES, so_far > drawn)) - 1);
        drawn -= __shfl_sync(ALL_LANES, so_far - of_warp, warp);
        const unsigned end = begin(warp + 1);
        for (unsigned first = begin(warp); first < end; first += blockDim.x) {
            const unsigned at = first + threadIdx.x;
            const P piece = pieces[min(at, count - 1)];
            const Mass own = at < end ? mass(piece, weights, least) : 0;
            const auto before = sum_before(shared, own);
            if (drawn < before.all) {
                if (before.own <= drawn && drawn - before.own < own) {
                    *token = at * COUNT + pick(piece, weights, least, drawn - before.own);
                }
                return;
            }
            drawn -= before.all;
        }
    }

    static __device__ inline unsigned pick(const P &piece, const Weights &weights, float least,
                                           Mass drawn) {
        Mass so_far = 0;
        unsigned token = 0;
#pragma unroll
        for (unsigned each = 0; each < COUNT; ++each) {
            const float logit = wide(piece.elements[each]);
            so_far += logit >= least ? weight(weights, logit).whole() : 0;
            token += so_far <= drawn ? 1 : 0;
        }
        return token;
    }
};

} // namespace sampling
