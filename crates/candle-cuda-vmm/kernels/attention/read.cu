// Copies rows of K and V of one sequence, one after the other, and converts them.
//
// `blockIdx.x` is the row. A warp takes one head of K or of V after another.
#include "arguments.cuh"
#include "warp.cuh"
#include <cuda_fp8.h>

namespace attention {

struct ReadArguments {
    Cache cache;
    // Contiguous, [rows, kv_heads, dim].
    void *k;
    void *v;
    unsigned sequence;
    // The first row.
    unsigned first;
};

__device__ inline float wide(__nv_fp8_e4m3 number) { return static_cast<float>(number); }

template <typename E, typename T> __device__ inline void read(const ReadArguments &given) {
    const Cache &cache = given.cache;
    const Cache::Where where = cache.find(given.sequence, given.first + blockIdx.x);
    const bool exists = cache.exists(where);
    for (unsigned at = threadIdx.x / LANES; at < 2 * cache.kv_heads; at += blockDim.x / LANES) {
        const bool is_key = at < cache.kv_heads;
        const unsigned head = is_key ? at : at - cache.kv_heads;
        const Side &side = is_key ? cache.k : cache.v;
        const unsigned long long row = 1ULL * blockIdx.x * cache.kv_heads + head;
        T *to = static_cast<T *>(is_key ? given.k : given.v) + row * side.dim;
        const auto *from = exists ? reinterpret_cast<const E *>(cache.row(side, where, head)) : nullptr;
        for (unsigned dim = lane_index(); dim < side.dim; dim += LANES) {
            // Nobody reads what is in a block that does not exist.
            narrow(exists ? wide(from[dim]) : 0.0F, to + dim);
        }
    }
}

} // namespace attention

ROW_KERNEL(read_f16, attention::ReadArguments) {
    attention::read<__half, __half>(given);
}
ROW_KERNEL(read_bf16, attention::ReadArguments) {
    attention::read<__nv_bfloat16, __nv_bfloat16>(given);
}
ROW_KERNEL(read_f32, attention::ReadArguments) {
    attention::read<float, float>(given);
}
ROW_KERNEL(read_f8_f16, attention::ReadArguments) {
    attention::read<__nv_fp8_e4m3, __half>(given);
}
ROW_KERNEL(read_f8_bf16, attention::ReadArguments) {
    attention::read<__nv_fp8_e4m3, __nv_bfloat16>(given);
}
