// Decode attention over K and V of F16.
#include "decode.cuh"
#include "tile_matrix.cuh"

namespace {

template <unsigned K_DIM, unsigned V_DIM>
using F16 = attention::TileMatrix<__half, __half, K_DIM, V_DIM>;

} // namespace

ATTENTION_KERNEL(decode_f16_64_64, F16, 64, 64)
ATTENTION_KERNEL(decode_f16_96_96, F16, 96, 96)
ATTENTION_KERNEL(decode_f16_128_128, F16, 128, 128)
ATTENTION_KERNEL(decode_f16_192_128, F16, 192, 128)
ATTENTION_KERNEL(decode_f16_192_192, F16, 192, 192)
ATTENTION_KERNEL(decode_f16_256_256, F16, 256, 256)
