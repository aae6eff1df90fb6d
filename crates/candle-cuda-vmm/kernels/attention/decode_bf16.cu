// Decode attention over K and V of BF16.
#include "decode.cuh"
#include "tile_matrix.cuh"

namespace {

template <unsigned K_DIM, unsigned V_DIM>
using BF16 = attention::TileMatrix<__nv_bfloat16, __nv_bfloat16, K_DIM, V_DIM>;

} // namespace

ATTENTION_KERNEL(decode_bf16_64_64, BF16, 64, 64)
ATTENTION_KERNEL(decode_bf16_96_96, BF16, 96, 96)
ATTENTION_KERNEL(decode_bf16_128_128, BF16, 128, 128)
ATTENTION_KERNEL(decode_bf16_192_128, BF16, 192, 128)
ATTENTION_KERNEL(decode_bf16_192_192, BF16, 192, 192)
ATTENTION_KERNEL(decode_bf16_256_256, BF16, 256, 256)
