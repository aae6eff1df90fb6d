//! A Llama-shaped decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU. `Model` has
//! the weights, and `Decoder` generates one sequence with it, generic over its caches.

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

/// The weights, and what follows from the configuration. It has no caches, so it computes tokens of
/// any sequences.
pub struct Model {
    embedding: Tensor,
    layers: Vec<Layer>,
    norm: Tensor,
    head: Tensor,
    norm_eps: f32,
    head_dim: usize,
    /// The options of every layer's attention.
    pub options: GqaOptions,
}

struct Layer {
    attention_norm: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    feed_forward_norm: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
}

/// The projections of new tokens in a layer, before rotation: `[tokens, heads, head_dim]` each.
pub struct Projections {
    pub q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
}

impl Model {
    pub fn new(config: &Config, mut weights: Weights) -> Result<Self> {
        let (hidden, vocabulary) = (config.hidden_size, config.vocab_size);
        let embedding = weights.matrix("model.embed_tokens.weight", vocabulary, hidden)?;
        let layers = (0..config.num_hidden_layers)
            .map(|layer| Layer::new(config, &mut weights, layer))
            .collect::<Result<_>>()?;
        let head = match config.tie_word_embeddings {
            true => embedding.clone(),
            false => weights.matrix("lm_head.weight", vocabulary, hidden)?,
        };
        let head_dim = config.head_dim();
        let mask = config.sliding_window.map_or(Mask::Causal, Mask::Window);
        Ok(Self {
            norm: weights.norm("model.norm.weight", hidden)?,
            embedding,
            layers,
            head,
            norm_eps: config.rms_norm_eps,
            head_dim,
            options: GqaOptions::new(1. / (head_dim as f32).sqrt()).mask(mask),
        })
    }

    pub fn device(&self) -> &Device {
        self.embedding.device()
    }

    /// Returns the hidden states of tokens after all layers: `[tokens, hidden_size]`.
    ///
    /// `tokens` is U32 `[tokens]`. `attend` stores the keys and values of a layer, which is counted
    /// from 0, and returns what its attention mixes: `[tokens, query_heads, head_dim]`.
    pub fn hidden(
        &self,
        tokens: &Tensor,
        mut attend: impl FnMut(usize, Projections) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let mut x = self.embedding.index_select(tokens, 0)?;
        for (at, layer) in self.layers.iter().enumerate() {
            let normed = rms_norm(&x, &layer.attention_norm, self.norm_eps)?;
            let mixed = attend(at, layer.project(&normed, self.head_dim)?)?;
            x = (x + linear(&mixed.flatten_from(1)?, &layer.o)?)?;
            let normed = rms_norm(&x, &layer.feed_forward_norm, self.norm_eps)?;
            x = (x + layer.feed_forward(&normed)?)?;
        }
        Ok(x)
    }

    /// Returns the logits of the tokens after those of some hidden states: `[tokens, vocab_size]`.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        let normed = rms_norm(&hidden.contiguous()?, &self.norm, self.norm_eps)?;
        linear(&normed, &self.head)
    }
}

impl Layer {
    fn new(config: &Config, weights: &mut Weights, layer: usize) -> Result<Self> {
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
        })
    }

    fn project(&self, x: &Tensor, head_dim: usize) -> Result<Projections> {
        let tokens = x.dim(0)?;
        let heads = |weight: &Tensor| linear(x, weight)?.reshape((tokens, (), head_dim));
        Ok(Projections {
            q: heads(&self.q)?,
            k: heads(&self.k)?,
            v: heads(&self.v)?,
        })
    }

    fn feed_forward(&self, x: &Tensor) -> Result<Tensor> {
        let gated = (silu(&linear(x, &self.gate)?)? * linear(x, &self.up)?)?;
        linear(&gated, &self.down)
    }
}

/// The decoder of one sequence, with a cache for each layer.
pub struct Decoder<C> {
    model: Model,
    caches: Vec<C>,
    rope: Rope,
    /// The attention that the next tokens use.
    pub attention: Attention,
}

impl<C: KvCache> Decoder<C> {
    /// Makes the model, with one cache per layer from the factory, for at most `max_seq_len`
    /// tokens.
    pub fn new<F: KvCacheFactory<Cache = C>>(
        config: &Config,
        weights: Weights,
        factory: &F,
        max_seq_len: usize,
        attention: Attention,
    ) -> Result<Self> {
        let model = Model::new(config, weights)?;
        let caches = (0..config.num_hidden_layers)
            .map(|layer| Ok(factory.layer(layer, 2, max_seq_len)?))
            .collect::<Result<_>>()?;
        Ok(Self {
            rope: Rope::new(config, model.embedding.dtype(), model.device())?,
            model,
            caches,
            attention,
        })
    }

    /// Appends tokens, and returns the logits of the token after the last: `[vocab_size]`.
    pub fn forward(&mut self, tokens: &[u32]) -> Result<Tensor> {
        let rope = self.rope.at(self.caches[0].position(), tokens.len())?;
        let ids = Tensor::new(tokens, self.model.device())?;
        let options = &self.model.options;
        let hidden = self.model.hidden(&ids, |layer, new| {
            let cache = &mut self.caches[layer];
            attend(cache, &new, (&rope.0, &rope.1), options, self.attention)
        })?;
        let last = hidden.narrow(0, tokens.len() - 1, 1)?;
        self.model.logits(&last)?.squeeze(0)
    }

    /// Returns the number of tokens in each cache.
    pub fn tokens(&self) -> usize {
        self.caches[0].current_seq_len()
    }

    /// Returns the caches, one for each layer.
    pub fn caches(&self) -> impl Iterator<Item = &C> {
        self.caches.iter()
    }
}

/// Appends new tokens to a cache, and attends over all of it.
fn attend<C: KvCache>(
    cache: &mut C,
    new: &Projections,
    (cos, sin): (&Tensor, &Tensor),
    options: &GqaOptions,
    attention: Attention,
) -> Result<Tensor> {
    // [1, heads, tokens, head_dim], token-major, as the projections return it.
    let rotated = |x: &Tensor| rope_thd(&x.unsqueeze(0)?, cos, sin)?.transpose(1, 2);
    let (q, k) = (rotated(&new.q)?, rotated(&new.k)?);
    let v = new.v.unsqueeze(0)?.transpose(1, 2)?;
    let (k, v) = cache.append(&k, &v)?;
    let window = match options.mask {
        Mask::Window(window) => Some(window),
        _ => None,
    };
    let mixed = match attention {
        Attention::Gqa => gqa_with(&q, &k, &v, options)?,
        Attention::Stock => stock(&q, &k, &v, options.scale, window)?,
    };
    if let Some(window) = window {
        // The next query sees its own key and one less than the window.
        let released = cache.current_seq_len().saturating_sub(window - 1);
        cache.release_front(released)?;
    }
    mixed.squeeze(0)?.transpose(0, 1)
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

/// Returns the cosine and the sine of each position's rotations, F32 `[positions, head_dim / 2]`.
pub fn rotations(config: &Config, device: &Device) -> Result<(Tensor, Tensor)> {
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
    Ok((
        angles.cos()?.to_device(device)?,
        angles.sin()?.to_device(device)?,
    ))
}

/// The rotary embedding of each position, `[positions, head_dim / 2]`.
struct Rope {
    cos: Tensor,
    sin: Tensor,
}

impl Rope {
    fn new(config: &Config, dtype: DType, device: &Device) -> Result<Self> {
        let (cos, sin) = rotations(config, &Device::Cpu)?;
        // Converted first, so that less is copied to the device.
        Ok(Self {
            cos: cos.to_dtype(dtype)?.to_device(device)?,
            sin: sin.to_dtype(dtype)?.to_device(device)?,
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
