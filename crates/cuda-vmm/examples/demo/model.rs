//! The models that share the GPU: how large a token of theirs is, and how fast they run.

/// A language model as far as its KV cache and its pace matter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Model {
    /// Name under which it registers in the pool.
    pub name: &'static str,
    /// The network whose dimensions are used.
    pub network: &'static str,
    /// Bytes of KV cache for one token.
    pub bytes_per_token: u64,
    /// Prompt tokens that one request has processed in a second.
    pub prompt_tokens_per_second: u64,
    /// Tokens that one request generates in a second.
    pub generated_tokens_per_second: u64,
}

/// The chat service.
pub const CHAT: Model = Model {
    name: "chat",
    network: "Llama 3.1 8B",
    bytes_per_token: kv_bytes_per_token(32, 8, 128),
    prompt_tokens_per_second: 12_000,
    generated_tokens_per_second: 40,
};

/// The code completion service.
pub const CODE: Model = Model {
    name: "code",
    network: "Qwen2.5 Coder 14B",
    bytes_per_token: kv_bytes_per_token(48, 8, 128),
    prompt_tokens_per_second: 7_000,
    generated_tokens_per_second: 30,
};

/// The batch job, which summarises long documents.
pub const BATCH: Model = Model {
    name: "batch",
    network: "Llama 3.2 3B",
    bytes_per_token: kv_bytes_per_token(28, 8, 128),
    prompt_tokens_per_second: 8_000,
    generated_tokens_per_second: 30,
};

/// A key and a value of `head_size` 16-bit numbers for every KV head of every layer.
const fn kv_bytes_per_token(layers: u64, kv_heads: u64, head_size: u64) -> u64 {
    layers * kv_heads * head_size * 2 * size_of::<u16>() as u64
}

impl Model {
    /// Time to process a prompt, in nanoseconds.
    pub fn prompt_ns(&self, tokens: u32) -> u64 {
        u64::from(tokens) * 1_000_000_000 / self.prompt_tokens_per_second
    }

    /// Time between two generated tokens of one request, in nanoseconds.
    pub fn token_ns(&self) -> u64 {
        1_000_000_000 / self.generated_tokens_per_second
    }

    /// KV cache of `tokens` tokens, in bytes.
    pub fn bytes(&self, tokens: u32) -> u64 {
        u64::from(tokens) * self.bytes_per_token
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_sizes_follow_from_the_networks() {
        assert_eq!(CHAT.bytes_per_token, 131_072);
        assert_eq!(CODE.bytes_per_token, 196_608);
        assert_eq!(BATCH.bytes_per_token, 114_688);
        assert_eq!(CHAT.bytes(3), 393_216);
    }

    #[test]
    fn times_follow_from_the_rates() {
        assert_eq!(CHAT.prompt_ns(12_000), 1_000_000_000);
        assert_eq!(CHAT.prompt_ns(0), 0);
        assert_eq!(CHAT.token_ns(), 25_000_000);
    }
}
