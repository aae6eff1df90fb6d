//! A Llama-shaped decoder, generic over its caches: RMSNorm, rotary positions, grouped-query
//! attention, SwiGLU.

use crate::config::{Config, RopeScaling};
use crate::weights::Weights;
use candle_core::{DType, Device, Result, Tensor};
use candle_cuda_vmm::attention::{GqaOptions, Mask, gqa_with};
use candle_cuda_vmm::kv_cache::{KvCache, KvCacheFactory};
use candle_nn::ops::{rms_norm, silu, softmax_last_dim};
use candle_nn::rotary_emb::rope_thd;

/// How attention reads keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Attention {
    /// As Candle's models do: K and V are repeated for each group of heads
    Stock,
    /// K and V are read in place
    Gqa,
}

/// The decoder, with a cache for each layer.
pub struct Decoder<C> {
    embedding: Tensor,
    layers: Vec<Layer<C>>,
    norm: Tensor,
    head: Tensor,
    rope: Rope,
    norm_eps: f32,
    /// The attention that the next tokens use.
    pub attention: Attention,
}

struct Layer<C> {
    attention_norm: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    feed_forward_norm: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    head_dim: usize,
    window: Option<usize>,
    cache: C,
}

impl<C: KvCache> Decoder<C> {
    /// Makes the model, with one cache per layer from the factory, for at most `max_seq_len`
    /// tokens.
    pub fn new<F: KvCacheFactory<Cache = C>>(
        config: &Config,
        mut weights: Weights,
        factory: &F,
        max_seq_len: usize,
        attention: Attention,
    ) -> Result<Self> {
        let (hidden, vocabulary) = (config.hidden_size, config.vocab_size);
        let embedding = weights.matrix("model.embed_tokens.weight", vocabulary, hidden)?;
        let layers = (0..config.num_hidden_layers)
            .map(|layer| {
                let cache = factory.layer(layer, 2, max_seq_len)?;
                Layer::new(config, &mut weights, layer, cache)
            })
            .collect::<Result<_>>()?;
        let head = match config.tie_word_embeddings {
            true => embedding.clone(),
            false => weights.matrix("lm_head.weight", vocabulary, hidden)?,
        };
        Ok(Self {
            rope: Rope::new(config, embedding.dtype(), embedding.device())?,
            norm: weights.norm("model.norm.weight", hidden)?,
            embedding,
            layers,
            head,
            norm_eps: config.rms_norm_eps,
            attention,
        })
    }

    /// Appends tokens, and returns the logits of the token after the last: `[vocab_size]`.
    pub fn forward(&mut self, tokens: &[u32]) -> Result<Tensor> {
        let first = self.layers[0].cache.position();
        let ids = Tensor::new(tokens, self.embedding.device())?;
        let mut x = self.embedding.index_select(&ids, 0)?;
        let (cos, sin) = self.rope.at(first, tokens.len())?;
        for layer in &mut self.layers {
            x = layer.forward(&x, (&cos, &sin), self.norm_eps, self.attention)?;
        }
        let last = x.narrow(0, tokens.len() - 1, 1)?.contiguous()?;
        let last = rms_norm(&last, &self.norm, self.norm_eps)?;
        linear(&last, &self.head)?.squeeze(0)
    }

    /// Returns the number of tokens in each cache.
    pub fn tokens(&self) -> usize {
        self.layers[0].cache.current_seq_len()
    }

    /// Returns the caches, one for each layer.
    pub fn caches(&self) -> impl Iterator<Item = &C> {
        self.layers.iter().map(|layer| &layer.cache)
    }
}

impl<C: KvCache> Layer<C> {
    fn new(config: &Config, weights: &mut Weights, layer: usize, cache: C) -> Result<Self> {
        let (hidden, between) = (config.hidden_size, config.intermediate_size);
        let head_dim = config.head_dim();
        let q_size = config.num_attention_heads * head_dim;
        let kv_size = config.kv_heads() * head_dim;
        let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
        Ok(Self {
            attention_norm: weights.norm(&name("input_layernorm"), hidden)?,
            q: weights.matrix(&name("self_attn.q_proj"), q_size, hidden)?,
            k: weights.matrix(&name("self_attn.k_proj"), kv_size, hidden)?,
            v: weights.matrix(&name("self_attn.v_proj"), kv_size, hidden)?,
            o: weights.matrix(&name("self_attn.o_proj"), hidden, q_size)?,
            feed_forward_norm: weights.norm(&name("post_attention_layernorm"), hidden)?,
            gate: weights.matrix(&name("mlp.gate_proj"), between, hidden)?,
            up: weights.matrix(&name("mlp.up_proj"), between, hidden)?,
            down: weights.matrix(&name("mlp.down_proj"), hidden, between)?,
            head_dim,
            window: config.sliding_window,
            cache,
        })
    }

    /// `x` is `[tokens, hidden_size]`, and so is the result.
    fn forward(
        &mut self,
        x: &Tensor,
        rope: (&Tensor, &Tensor),
        norm_eps: f32,
        attention: Attention,
    ) -> Result<Tensor> {
        let normed = rms_norm(x, &self.attention_norm, norm_eps)?;
        let x = (x + self.attend(&normed, rope, attention)?)?;
        let normed = rms_norm(&x, &self.feed_forward_norm, norm_eps)?;
        let gated = (silu(&linear(&normed, &self.gate)?)? * linear(&normed, &self.up)?)?;
        x + linear(&gated, &self.down)?
    }

    fn attend(
        &mut self,
        x: &Tensor,
        (cos, sin): (&Tensor, &Tensor),
        attention: Attention,
    ) -> Result<Tensor> {
        let tokens = x.dim(0)?;
        // [1, tokens, heads, head_dim]: token-major, as the projections return it.
        let heads =
            |projection: &Tensor| linear(x, projection)?.reshape((1, tokens, (), self.head_dim));
        let q = rope_thd(&heads(&self.q)?, cos, sin)?.transpose(1, 2)?;
        let k = rope_thd(&heads(&self.k)?, cos, sin)?.transpose(1, 2)?;
        let v = heads(&self.v)?.transpose(1, 2)?;
        let (k, v) = self.cache.append(&k, &v)?;
        let mask = self.window.map_or(Mask::Causal, Mask::Window);
        let options = GqaOptions::new(1. / (self.head_dim as f32).sqrt()).mask(mask);
        let mixed = match attention {
            Attention::Gqa => gqa_with(&q, &k, &v, &options)?,
            Attention::Stock => stock(&q, &k, &v, options.scale, self.window)?,
        };
        if let Some(window) = self.window {
            // The next query sees its own key and one less than the window.
            let released = self.cache.current_seq_len().saturating_sub(window - 1);
            self.cache.release_front(released)?;
        }
        linear(&mixed.transpose(1, 2)?.reshape((tokens, ()))?, &self.o)
    }
}

/// Causal attention as in Candle's models. A query of several sees the last `window` keys.
pub fn stock(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    scale: f32,
    window: Option<usize>,
) -> Result<Tensor> {
    let (_, query_heads, queries, _) = q.dims4()?;
    let (batch, kv_heads, keys, dim) = k.dims4()?;
    let group = query_heads / kv_heads;
    let repeat = |kv: &Tensor| match group {
        1 => kv.contiguous(),
        _ => Tensor::cat(&vec![kv; group], 2)?.reshape((batch, query_heads, keys, dim)),
    };
    let (k, v) = (repeat(k)?, repeat(v)?);
    let scores = q.contiguous()?.matmul(&k.t()?)?.affine(scale.into(), 0.)?;
    let scores = match queries {
        1 => scores,
        _ => {
            let seen = |own: usize, key: usize| {
                key <= own && window.is_none_or(|window| own - key < window)
            };
            let mask: Vec<f32> = (keys - queries..keys)
                .flat_map(|own| {
                    (0..keys).map(move |key| match seen(own, key) {
                        true => 0.,
                        false => f32::NEG_INFINITY,
                    })
                })
                .collect();
            let mask = Tensor::from_vec(mask, (queries, keys), q.device())?;
            scores.broadcast_add(&mask.to_dtype(q.dtype())?)?
        }
    };
    softmax_last_dim(&scores)?.matmul(&v)
}

fn linear(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    x.matmul(&weight.t()?)
}

/// The rotary embedding of each position, `[positions, head_dim / 2]`.
struct Rope {
    cos: Tensor,
    sin: Tensor,
}

impl Rope {
    fn new(config: &Config, dtype: DType, device: &Device) -> Result<Self> {
        let half = config.head_dim() / 2;
        let frequencies: Vec<f32> = (0..half)
            .map(|index| config.rope_theta.powf(-(index as f32) / half as f32))
            .map(|frequency| scaled(frequency, config.rope_scaling))
            .collect();
        let positions = config.max_position_embeddings;
        let angles: Vec<f32> = (0..positions)
            .flat_map(|position| frequencies.iter().map(move |f| position as f32 * f))
            .collect();
        let angles = Tensor::from_vec(angles, (positions, half), &Device::Cpu)?;
        Ok(Self {
            cos: angles.cos()?.to_dtype(dtype)?.to_device(device)?,
            sin: angles.sin()?.to_dtype(dtype)?.to_device(device)?,
        })
    }

    fn at(&self, first: usize, count: usize) -> Result<(Tensor, Tensor)> {
        Ok((
            self.cos.narrow(0, first, count)?,
            self.sin.narrow(0, first, count)?,
        ))
    }
}

/// Scales a rotary frequency as Llama 3.1 and later do.
fn scaled(frequency: f32, scaling: Option<RopeScaling>) -> f32 {
    let Some(RopeScaling::Llama3 {
        factor,
        low_freq_factor: low,
        high_freq_factor: high,
        original_max_position_embeddings: original,
    }) = scaling
    else {
        return frequency;
    };
    // The number of turns within the positions of the original training.
    let turns = original as f32 * frequency / (2. * std::f32::consts::PI);
    let kept = ((turns - low) / (high - low)).clamp(0., 1.);
    frequency * (kept + (1. - kept) / factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn low_frequencies_are_stretched_and_high_ones_kept() {
        let scaling = Some(RopeScaling::Llama3 {
            factor: 8.,
            low_freq_factor: 1.,
            high_freq_factor: 4.,
            original_max_position_embeddings: 8192,
        });
        let turning = |turns: f32| turns * 2. * std::f32::consts::PI / 8192.;
        for (turns, expected) in [
            (0.5, 0.0625),
            (1., 0.125),
            (2.5, 1.40625),
            (4., 4.),
            (9., 9.),
        ] {
            let off = scaled(turning(turns), scaling) - turning(expected);
            assert!(off.abs() < 1e-6 * turning(9.), "{turns}");
        }
        assert_eq!(scaled(0.3, None), 0.3);
        assert_eq!(scaled(0.3, Some(RopeScaling::Default)), 0.3);
    }
}
