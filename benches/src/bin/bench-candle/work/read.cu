// Reads vectors of 16 bytes, each once, as fast as memory gives them. `to` keeps what they make up,
// so that nothing is left out.
extern "C" __global__ void read_once(const uint4 *from, unsigned long long vectors, unsigned *to) {
    constexpr unsigned AT_ONCE = 8;
    const unsigned long long first =
        static_cast<unsigned long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    const unsigned long long step = static_cast<unsigned long long>(gridDim.x) * blockDim.x;
    unsigned all = 0;
    for (unsigned long long at = first; at < vectors; at += AT_ONCE * step) {
        uint4 read[AT_ONCE] = {};
#pragma unroll
        for (unsigned which = 0; which < AT_ONCE; ++which) {
            if (at + which * step < vectors) {
                read[which] = __ldg(from + at + which * step);
            }
        }
#pragma unroll
        for (unsigned which = 0; which < AT_ONCE; ++which) {
            all ^= read[which].x ^ read[which].y ^ read[which].z ^ read[which].w;
        }
    }
    if (all != 0) {
        *to = all;
    }
}
