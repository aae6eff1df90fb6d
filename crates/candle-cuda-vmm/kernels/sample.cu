// Draws a token of each row of logits. A thread block takes a row, and reads it three times:
//
// 1. for the largest logit, which is all that a greedy row needs;
// 2. if the most likely tokens are to be kept: for the number of tokens in each of many bins. They
//    tell which bins the set's smallest logit is in: a few of them;
// 3. for the weights. Tokens of those few bins go to a list, in which the smallest logit is found.
//
// Weights are whole numbers (`weights.cuh`), so the bins only save time: what they tell is checked
// in the third turn, and if it was wrong, or if the list is full, the logit is found by bisection
// over the whole row. `src/sampling/cuda.rs` has the arguments' fields in the same order.
#include "sampling/row.cuh"

namespace sampling {

struct SampleArguments {
    rows::Rows logits;
    // One for each row; two of the seed.
    const float *temperature;
    const float *top_p;
    const unsigned *seed;
    const unsigned *position;
    unsigned *output;
    // Tokens of a row: at most 2^18, so that a sum of weights fits.
    unsigned size;
    // Whether all rows begin and end at multiples of 16 bytes.
    unsigned is_wide;
};

// Low bits that are the same in all logits of a type, as integers.
__device__ inline unsigned unused_bits(float) { return 0; }
__device__ inline unsigned unused_bits(__half) { return 13; }
__device__ inline unsigned unused_bits(__nv_bfloat16) { return 16; }

// A logit for an integer without those bits. Those of a negative one are set in the order.
__device__ inline float logit_of(unsigned key, unsigned unused) {
    const unsigned first = key << unused;
    return number_of(first >> 31 != 0 ? first : first | ((1U << unused) - 1));
}

// The largest logit from which on the mass is enough: that from `enough` on is, and that from
// `short_of` on is not. They are integers in the order of logits.
template <typename MassFrom>
__device__ inline float bisect(unsigned enough, unsigned short_of, unsigned unused, Mass wanted,
                               MassFrom mass_from) {
    while (short_of - enough > 1) {
        const unsigned middle = enough + (short_of - enough) / 2;
        (mass_from(logit_of(middle, unused)) >= wanted ? enough : short_of) = middle;
    }
    return logit_of(enough, unused);
}

// Finds the set's smallest logit on the list. `mass` is that of the tokens that are in the set for
// certain, and becomes that of the set. Returns whether it is on the list.
template <typename T, unsigned COUNT>
__device__ inline bool find_on_list(Shared &shared, const Weights &weights, Mass wanted,
                                    const Row<T, COUNT> &, Mass &mass, float &least) {
    const unsigned length = shared.length;
    if (length > LISTED || mass >= wanted) {
        return false;
    }
    const auto mass_from = [&](float logit) {
        Mass own = 0;
        for (unsigned at = threadIdx.x; at < length; at += blockDim.x) {
            const float other = shared.list[at];
            own += other >= logit ? weight(weights, other).whole() : 0;
        }
        return mass + sum(shared, own);
    };
    if (mass_from(-INFINITY) < wanted) {
        return false;
    }
    unsigned smallest = ~0U, greatest = 0;
    for (unsigned at = threadIdx.x; at < length; at += blockDim.x) {
        const unsigned key = ordered(shared.list[at]);
        smallest = min(smallest, key);
        greatest = max(greatest, key);
    }
    smallest = ~static_cast<unsigned>(largest(shared, ~smallest));
    greatest = static_cast<unsigned>(largest(shared, greatest));
    const unsigned unused = unused_bits(T());
    least = bisect(smallest >> unused, (greatest >> unused) + 1, unused, wanted, mass_from);
    for (unsigned at = threadIdx.x; at < length; at += blockDim.x) {
        const float logit = shared.list[at];
        if (logit >= least) {
            atomicAdd(&shared.masses[shared.list_warps[at]], weight(weights, logit).whole());
        }
    }
    mass = mass_from(least);
    return true;
}

// The same by bisection over the whole row.
template <typename T, unsigned COUNT>
__device__ inline void find_in_row(Shared &shared, const Weights &weights, Mass wanted,
                                   const Row<T, COUNT> &row, Mass &mass, float &least) {
    const auto own_mass_from = [&](float logit) {
        Mass own = 0;
        row.template for_each<WEIGHED>([&](unsigned, const typename Row<T, COUNT>::P &piece) {
            own += row.mass(piece, weights, logit);
        });
        return own;
    };
    const unsigned unused = unused_bits(T());
    least = bisect(ordered(weights.bottom()) >> unused, (ordered(weights.largest) >> unused) + 1,
                   unused, wanted, [&](float logit) { return sum(shared, own_mass_from(logit)); });
    mass = row.set_masses(shared, own_mass_from(least));
}

// A block draws one token.
template <typename T, unsigned COUNT>
__device__ inline void sample(const SampleArguments &given, Shared &shared) {
    using P = Piece<T, COUNT>;
    const P *pieces = rows::row<P>(given.logits, static_cast<const T *>(nullptr));
    const Row<T, COUNT> row = {pieces, given.size / COUNT};
    unsigned *token = given.output + blockIdx.x;
    const float temperature = given.temperature[blockIdx.x], p = given.top_p[blockIdx.x];
    if (threadIdx.x == 0) {
        shared.length = 0;
    }
    unsigned piece;
    const float best = row.find_largest(shared, piece);
    if (!(temperature > 0.0F) || fabsf(best) == INFINITY) {
        if (threadIdx.x == 0) {
            *token = best == -INFINITY ? 0 : piece * COUNT + row.first_of(piece, best);
        }
        return;
    }
    const Weights weights(best, temperature);
    const Bins bins(weights, p, given.size);
    const bool has_all = !(p < 1.0F);
    const Between between =
        has_all ? Between{INFINITY, INFINITY} : row.count_bins(shared, bins, p);
    Mass mass;
    const Mass whole = row.weigh(shared, weights, bins, between, mass);
    float least = -INFINITY;
    if (!has_all) {
        const Mass wanted = target(p, whole);
        if (!find_on_list(shared, weights, wanted, row, mass, least)) {
            find_in_row(shared, weights, wanted, row, mass, least);
        }
    }
    const unsigned *seed = given.seed + 2 * blockIdx.x;
    const Mass bits = random_bits(seed[0], seed[1], given.position[blockIdx.x]);
    row.pick(shared, weights, least, __umul64hi(bits, mass), token);
}

template <typename T> __device__ inline void sample(const SampleArguments &given) {
    __shared__ Shared shared;
    attention::wait_for_earlier_kernels();
    if (given.is_wide != 0) {
        sample<T, 16 / sizeof(T)>(given, shared);
    } else {
        sample<T, 1>(given, shared);
    }
}

} // namespace sampling

ROWS_KERNEL(sample_f16, sampling::SampleArguments) { sampling::sample<__half>(given); }
ROWS_KERNEL(sample_bf16, sampling::SampleArguments) { sampling::sample<__nv_bfloat16>(given); }
ROWS_KERNEL(sample_f32, sampling::SampleArguments) { sampling::sample<float>(given); }
