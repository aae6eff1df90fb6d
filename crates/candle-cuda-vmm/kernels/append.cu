// Appends tokens to the rows of keys and of values, and on demand copies all rows to contiguous
// outputs.
//
// `blockIdx.y` is the side: 0 for keys, 1 for values. One thread copies one piece of 16 bytes of
// the side's output, or without outputs of its new tokens. A token has `outer` runs of `pieces`
// pieces. They lie side by side in a row; in an output they are `all` tokens apart.

// Where one side's tokens come from and go.
struct Side {
    // The side's part of the first of `all` rows. All pieces of a token are contiguous here.
    char *rows;
    // The new tokens.
    const char *tokens;
    // All tokens, contiguous by runs; null if none is wanted.
    uint4 *output;
    // Bytes from one run of a new token to its next.
    unsigned long long outer_stride;
    // Bytes from one new token to the next.
    unsigned long long token_stride;
};

// A row begins `row_bytes` behind the one before it. The first `old` of `all` rows are there
// already. A side has `total` pieces.
extern "C" __global__ void append_tokens(
    char *rows_0, const char *tokens_0, uint4 *output_0, unsigned long long outer_stride_0,
    unsigned long long token_stride_0,
    char *rows_1, const char *tokens_1, uint4 *output_1, unsigned long long outer_stride_1,
    unsigned long long token_stride_1,
    unsigned long long row_bytes, unsigned pieces, unsigned all, unsigned old, unsigned total) {
    const unsigned at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= total) {
        return;
    }
    const Side side =
        blockIdx.y == 0 ? Side{rows_0, tokens_0, output_0, outer_stride_0, token_stride_0}
                        : Side{rows_1, tokens_1, output_1, outer_stride_1, token_stride_1};
    const unsigned piece = at % pieces;
    const unsigned token = at / pieces % all;
    const unsigned outer = at / pieces / all;
    char *place = side.rows + token * row_bytes + sizeof(uint4) * (outer * pieces + piece);
    uint4 bytes;
    if (token < old) {
        bytes = *reinterpret_cast<const uint4 *>(place);
    } else {
        const char *from = side.tokens + (token - old) * side.token_stride +
                           outer * side.outer_stride + sizeof(uint4) * piece;
        bytes = *reinterpret_cast<const uint4 *>(from);
        *reinterpret_cast<uint4 *>(place) = bytes;
    }
    if (side.output != nullptr) {
        side.output[at] = bytes;
    }
}
