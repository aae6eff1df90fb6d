//! A Llama-shaped decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU. `Model` has
//! the weights, and `Decoder` generates one sequence with it, generic over its caches.

use crate::config::{Config, RopeScaling};
use crate::weights::{Source, Wanted, Weights};
use candle_core::{DType, Device, Result, Tensor};
use candle_cuda_vmm::attention::{GqaOptions, Mask, gqa_with};
use candle_cuda_vmm::fused::{RmsNorm, add_rms_norm, gated_linear, linear, silu_mul};
use candle_cuda_vmm::kv_cache::{KvCache, KvCacheFactory};
use candle_nn::ops::softmax_last_dim;
use candle_nn::rotary_emb::rope_thd;
use std::cell::RefCell;
use std::rc::Rc;

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
    heads: Heads,
    /// The options of every layer's attention.
    pub options: GqaOptions,
}

/// Matrices that multiply the same are joined, so a decode step has fewer and larger products.
struct Layer {
    attention_norm: Tensor,
    /// Q, K and V, one below the other.
    qkv: Tensor,
    o: Tensor,
    feed_forward_norm: Tensor,
    gate_up: Tensor,
    down: Tensor,
}

/// The heads of a token in a layer.
#[derive(Clone, Copy)]
struct Heads {
    queries: usize,
    kv: usize,
    dim: usize,
}

/// The projections of new tokens in a layer, before rotation: `[tokens, heads, head_dim]` each, all
/// in one tensor.
pub struct Projections {
    pub q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
}

/// The hidden states of tokens after all layers, `[tokens, hidden_size]`: a residual stream, and
/// what the last layer adds to it.
pub struct Hidden {
    residual: Tensor,
    added: Option<Tensor>,
}

impl Hidden {
    /// Returns those of some tokens. `of` chooses rows.
    pub fn select(&self, of: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Self> {
        Ok(Self {
            residual: of(&self.residual)?,
            added: self.added.as_ref().map(of).transpose()?,
        })
    }
}

impl Heads {
    /// Divides the product of tokens with the weights of Q, K and V.
    fn of(self, qkv: &Tensor) -> Result<Projections> {
        let all = qkv.reshape((qkv.dim(0)?, (), self.dim))?;
        Ok(Projections {
            q: all.narrow(1, 0, self.queries)?,
            k: all.narrow(1, self.queries, self.kv)?,
            v: all.narrow(1, self.queries + self.kv, self.kv)?,
        })
    }
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
        let heads = Heads {
            queries: config.num_attention_heads,
            kv: config.kv_heads(),
            dim: config.head_dim(),
        };
        let mask = config.sliding_window.map_or(Mask::Causal, Mask::Window);
        Ok(Self {
            norm: weights.norm("model.norm.weight", hidden)?,
            embedding,
            layers,
            head,
            norm_eps: config.rms_norm_eps,
            heads,
            options: GqaOptions::new(1. / (heads.dim as f32).sqrt()).mask(mask),
        })
    }

    /// The weights that a model of this configuration asks for.
    pub fn wanted(config: &Config) -> Result<Wanted> {
        let wanted = Rc::new(RefCell::default());
        let source = Source::Wanted(wanted.clone());
        Self::new(config, Weights::new(source, DType::F32, &Device::Cpu))?;
        Ok(wanted.take())
    }

    pub fn device(&self) -> &Device {
        self.embedding.device()
    }

    /// Returns the hidden states of tokens after all layers.
    ///
    /// `tokens` is U32 `[tokens]`. `attend` stores the keys and values of a layer, which is counted
    /// from 0, and returns what its attention mixes: `[tokens, query_heads, head_dim]`.
    pub fn hidden(
        &self,
        tokens: &Tensor,
        mut attend: impl FnMut(usize, Projections) -> Result<Tensor>,
    ) -> Result<Hidden> {
        let mut hidden = Hidden {
            residual: self.embedding.index_select(tokens, 0)?,
            added: None,
        };
        for (at, layer) in self.layers.iter().enumerate() {
            hidden = match tokens.dim(0)? {
                1 => self.token(&hidden.residual, layer, |new| attend(at, new))?,
                _ => self.tokens(&hidden, layer, |new| attend(at, new))?,
            };
        }
        Ok(hidden)
    }

    /// What a layer makes of one token: a launch for each product.
    fn token(
        &self,
        x: &Tensor,
        layer: &Layer,
        attend: impl FnOnce(Projections) -> Result<Tensor>,
    ) -> Result<Hidden> {
        let qkv = linear(x, &layer.qkv, self.norm(&layer.attention_norm), None)?;
        let mixed = attend(self.heads.of(&qkv)?)?;
        let x = linear(&mixed.flatten_from(1)?, &layer.o, None, Some(x))?;
        let gated = gated_linear(&x, &layer.gate_up, self.norm(&layer.feed_forward_norm))?;
        Ok(Hidden {
            residual: linear(&gated, &layer.down, None, Some(&x))?,
            added: None,
        })
    }

    /// What a layer makes of several: sums and norms are a launch together.
    fn tokens(
        &self,
        hidden: &Hidden,
        layer: &Layer,
        attend: impl FnOnce(Projections) -> Result<Tensor>,
    ) -> Result<Hidden> {
        let (residual, normed) = self.normed(hidden, &layer.attention_norm)?;
        let mixed = attend(self.heads.of(&linear(&normed, &layer.qkv, None, None)?)?)?;
        let added = Some(linear(&mixed.flatten_from(1)?, &layer.o, None, None)?);
        let (residual, normed) =
            self.normed(&Hidden { residual, added }, &layer.feed_forward_norm)?;
        let gated = silu_mul(&linear(&normed, &layer.gate_up, None, None)?)?;
        let added = Some(linear(&gated, &layer.down, None, None)?);
        Ok(Hidden { residual, added })
    }

    /// Returns the logits of the tokens after those of some hidden states: `[tokens, vocab_size]`.
    pub fn logits(&self, hidden: &Hidden) -> Result<Tensor> {
        match &hidden.added {
            None => linear(&hidden.residual, &self.head, self.norm(&self.norm), None),
            Some(_) => linear(&self.normed(hidden, &self.norm)?.1, &self.head, None, None),
        }
    }

    fn norm<'a>(&self, weight: &'a Tensor) -> Option<RmsNorm<'a>> {
        let eps = self.norm_eps;
        Some(RmsNorm { weight, eps })
    }

    /// Adds what a layer adds, and returns the residual stream and its norm.
    fn normed(&self, hidden: &Hidden, weight: &Tensor) -> Result<(Tensor, Tensor)> {
        let added = hidden.added.as_ref();
        add_rms_norm(&hidden.residual, added, weight, self.norm_eps)
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
            qkv: weights.joined(
                &[
                    (&name("self_attn.q_proj"), q_size),
                    (&name("self_attn.k_proj"), kv_size),
                    (&name("self_attn.v_proj"), kv_size),
                ],
                hidden,
            )?,
            o: weights.matrix(&name("self_attn.o_proj"), hidden, q_size)?,
            feed_forward_norm: weights.norm(&name("post_attention_layernorm"), hidden)?,
            gate_up: weights.joined(
                &[
                    (&name("mlp.gate_proj"), between),
                    (&name("mlp.up_proj"), between),
                ],
                hidden,
            )?,
            down: weights.matrix(&name("mlp.down_proj"), hidden, between)?,
        })
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
        let last = hidden.select(|all| all.narrow(0, tokens.len() - 1, 1))?;
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
    // [1, heads, tokens, head_dim], token-major. Candle rotates contiguous tensors only.
    let rotated = |x: &Tensor| {
        let x = x.contiguous()?.unsqueeze(0)?;
        rope_thd(&x, cos, sin)?.transpose(1, 2)
    };
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
