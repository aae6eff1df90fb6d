// Rotates the queries and keys of new tokens, and writes keys and values to their rows.
//
// A warp takes one head of one token: a query head, a head of K or a head of V. `blockIdx.x` is the
// token. Arithmetic is F32.
#include "arguments.cuh"
#include "warp.cuh"
#include <cuda_fp8.h>

namespace attention {

// New queries, keys or values, [tokens, heads, dim]. The elements of a head are contiguous.
struct Heads {
    const void *first;
    // Elements from one token to the next, and from one head to the next.
    unsigned long long token_stride;
    unsigned long long head_stride;
};

struct WriteArguments {
    Cache cache;
    Heads q;
    Heads k;
    Heads v;
    // The rotated queries, contiguous.
    void *output;
    // Cosines and sines, [positions, rotary_dim / 2]; null if nothing is rotated.
    const float *cos;
    const float *sin;
    // The position of each token.
    const unsigned *token_positions;
    // The sequence and the row of each token. If null, token i is the last of sequence i.
    const unsigned *sequences;
    const unsigned *rows;
    unsigned query_heads;
    unsigned positions_max;
    unsigned rotary_dim;
    // Whether neighbours are pairs, and not the halves of what is rotated.
    unsigned interleaved;
    // What is stored is divided by it.
    float k_scale;
    float v_scale;
};

// The number of an element after the rotation.
template <typename T>
__device__ inline float rotated(const WriteArguments &given, const T *head, unsigned token,
                                unsigned dim) {
    const float own = wide(head[dim]);
    if (given.cos == nullptr || dim >= given.rotary_dim) {
        return own;
    }
    const unsigned half = given.rotary_dim / 2;
    const bool is_second = given.interleaved != 0 ? dim % 2 != 0 : dim >= half;
    const unsigned pair = given.interleaved != 0 ? dim / 2 : dim % half;
    const unsigned partner = given.interleaved != 0 ? dim ^ 1 : (dim + half) % given.rotary_dim;
    const unsigned position = given.token_positions[token];
    if (position >= given.positions_max) {
        // The table has no such position. Not a number, so that it shows.
        return __int_as_float(0x7fffffff);
    }
    const float other = wide(head[partner]);
    const unsigned long long at = 1ULL * position * half + pair;
    const float turn = given.sin[at] * other;
    return own * given.cos[at] + (is_second ? turn : -turn);
}

__device__ inline void narrow(float number, __nv_fp8_e4m3 *to) { *to = __nv_fp8_e4m3(number); }

template <typename T, typename E> __device__ inline void write(const WriteArguments &given) {
    wait_for_earlier_kernels();
    const Cache &cache = given.cache;
    const unsigned token = blockIdx.x;
    const unsigned lane = lane_index();
    unsigned head = blockIdx.y * (blockDim.x / LANES) + threadIdx.x / LANES;
    const auto place = [&](const Heads &heads) {
        return static_cast<const T *>(heads.first) + token * heads.token_stride +
               head * heads.head_stride;
    };
    if (head < given.query_heads) {
        const T *from = place(given.q);
        const unsigned dims = cache.k.dim;
        T *to = static_cast<T *>(given.output) +
                (1ULL * token * given.query_heads + head) * dims;
        for (unsigned dim = lane; dim < dims; dim += LANES) {
            narrow(rotated(given, from, token, dim), to + dim);
        }
        return;
    }
    head -= given.query_heads;
    const bool is_key = head < cache.kv_heads;
    head -= is_key ? 0 : cache.kv_heads;
    const unsigned sequence = given.sequences == nullptr ? token : given.sequences[token];
    if (head >= cache.kv_heads || sequence >= cache.batch) {
        return;
    }
    // The last row of an empty sequence is beyond any capacity.
    const unsigned row = given.rows == nullptr ? cache.lengths[sequence] - 1 : given.rows[token];
    if (row >= cache.capacity_of(sequence)) {
        return;
    }
    const Cache::Where where = cache.find(sequence, row);
    if (!cache.exists(where)) {
        return;
    }
    const Side &side = is_key ? cache.k : cache.v;
    const T *from = place(is_key ? given.k : given.v);
    E *to = reinterpret_cast<E *>(cache.row(side, where, head));
    const float scale = is_key ? given.k_scale : given.v_scale;
    for (unsigned dim = lane; dim < side.dim; dim += LANES) {
        const float number = is_key ? rotated(given, from, token, dim) : wide(from[dim]);
        narrow(sizeof(E) == 1 ? number / scale : number, to + dim);
    }
}

} // namespace attention

ROW_KERNEL(write_f16, attention::WriteArguments) {
    attention::write<__half, __half>(given);
}
ROW_KERNEL(write_bf16, attention::WriteArguments) {
    attention::write<__nv_bfloat16, __nv_bfloat16>(given);
}
ROW_KERNEL(write_f32, attention::WriteArguments) {
    attention::write<float, float>(given);
}
ROW_KERNEL(write_f8_f16, attention::WriteArguments) {
    attention::write<__half, __nv_fp8_e4m3>(given);
}
ROW_KERNEL(write_f8_bf16, attention::WriteArguments) {
    attention::write<__nv_bfloat16, __nv_fp8_e4m3>(given);
}
