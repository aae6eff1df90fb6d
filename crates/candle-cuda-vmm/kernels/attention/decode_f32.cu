// Decode attention over K and V of F32.
#include "decode.cuh"
#include "tile_f32.cuh"

namespace {

template <unsigned K_DIM, unsigned V_DIM>
using F32 = attention::TileF32<K_DIM, V_DIM>;

} // namespace

ATTENTION_KERNEL(decode_f32_64_64, F32, 64, 64)
ATTENTION_KERNEL(decode_f32_96_96, F32, 96, 96)
ATTENTION_KERNEL(decode_f32_128_128, F32, 128, 128)
ATTENTION_KERNEL(decode_f32_192_128, F32, 192, 128)
ATTENTION_KERNEL(decode_f32_192_192, F32, 192, 192)
ATTENTION_KERNEL(decode_f32_256_256, F32, 256, 256)
