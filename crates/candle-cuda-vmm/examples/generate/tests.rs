//! The whole decoder on the CPU: what it generates does not depend on the cache.

use crate::caches::{Cached, Measured};
use crate::config::Config;
use crate::generation::{Generation, Generator, generate, prompt};
use crate::model::{Attention, Decoder, Model};
use crate::token_bytes;
use crate::weights::{Source, Weights, joined, random, read};
use candle_core::{DType, Device, Error, Tensor};
use candle_cuda_vmm::kv_cache::{ConcatCaches, PreallocatedCaches};
use candle_nn::VarBuilder;
use std::collections::HashMap;

const PROMPT: usize = 9;
const TOKENS: usize = 24;
const WINDOW: usize = 6;

fn config() -> Config {
    Config::parse(
        r#"{ "vocab_size": 160, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3,
             "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 64 }"#,
    )
    .unwrap()
}

/// The same with a window that the prompt and the generated tokens exceed.
fn windowed() -> Config {
    let mut config = config();
    config.sliding_window = Some(WINDOW);
    config
}

fn run<F: Measured>(factory: &F, attention: Attention, seed: u64, dtype: DType) -> Generation {
    let weights = Weights::new(Source::Random(seed), dtype, &Device::Cpu);
    // The cache for 16 tokens has to become larger on the way.
    run_with(factory, attention, weights, seed, 16, dtype)
}

fn run_with<F: Measured>(
    factory: &F,
    attention: Attention,
    weights: Weights,
    seed: u64,
    max_seq_len: usize,
    dtype: DType,
) -> Generation {
    let config = config();
    let decoder = Decoder::new(&config, weights, factory, max_seq_len, attention).unwrap();
    let prompt = prompt(config.vocab_size, PROMPT, seed);
    let bytes = token_bytes(&config, dtype);
    let mut decoder = Cached { decoder, factory };
    generate(&mut decoder, bytes, &prompt, TOKENS, 4).unwrap()
}

#[test]
fn every_cache_and_attention_gives_the_same_tokens() {
    for seed in 0..4 {
        let expected = run(&PreallocatedCaches, Attention::Stock, seed, DType::F32).tokens;
        assert_eq!(expected.len(), TOKENS);
        for attention in [Attention::Stock, Attention::Gqa] {
            let preallocated = run(&PreallocatedCaches, attention, seed, DType::F32);
            assert_eq!(preallocated.tokens, expected, "{attention:?}");
            let concatenated = run(&ConcatCaches, attention, seed, DType::F32);
            assert_eq!(concatenated.tokens, expected, "{attention:?}");
            // The CPU has a pool with this feature only.
            #[cfg(feature = "simulator")]
            {
                let pool = candle_cuda_vmm::TensorPool::new(&Device::Cpu).unwrap();
                let elastic = run(&pool, attention, seed, DType::F32);
                assert_eq!(elastic.tokens, expected, "{attention:?}");
            }
        }
    }
}

#[test]
fn tokens_follow_from_the_seed_and_are_not_always_the_same_one() {
    let tokens = |seed| run(&ConcatCaches, Attention::Gqa, seed, DType::F32).tokens;
    assert_eq!(tokens(1), tokens(1));
    assert_ne!(tokens(1), tokens(2));
    let mut different = tokens(1);
    different.sort_unstable();
    different.dedup();
    assert!(different.len() > 2, "{different:?}");
}

#[test]
fn a_prompt_token_by_token_gives_what_it_gives_at_once() {
    for attention in [Attention::Stock, Attention::Gqa] {
        let decoder = || {
            let weights = Weights::new(Source::Random(3), DType::F32, &Device::Cpu);
            Decoder::new(&config(), weights, &ConcatCaches, 64, attention).unwrap()
        };
        let prompt = prompt(160, PROMPT, 3);
        let whole = decoder().forward(&prompt).unwrap();
        let mut stepwise = decoder();
        let mut last = None;
        for token in &prompt {
            last = Some(stepwise.forward(&[*token]).unwrap());
        }
        let off = (whole - last.unwrap()).unwrap().abs().unwrap();
        let off = off.max(0).unwrap().to_scalar::<f32>().unwrap();
        assert!(off < 1e-4, "{off}");
    }
}

#[test]
fn a_window_bounds_the_caches_and_every_cache_and_attention_gives_the_same_tokens() {
    fn check<F: Measured>(factory: &F, attention: Attention, expected: &mut Option<Vec<u32>>) {
        let weights = || Weights::new(Source::Random(5), DType::F32, &Device::Cpu);
        let decoder = || Cached {
            decoder: Decoder::new(&windowed(), weights(), factory, 16, attention).unwrap(),
            factory,
        };
        let (mut whole, prompt) = (decoder(), prompt(160, PROMPT, 5));
        let generation = generate(&mut whole, 1, &prompt, TOKENS, 4).unwrap();
        for sample in &generation.samples {
            assert_eq!(sample.cached_tokens, WINDOW - 1);
        }
        let expected = expected.get_or_insert(generation.tokens.clone());
        assert_eq!(generation.tokens, *expected, "{attention:?}");
        let mut in_parts = decoder();
        in_parts.forward(&prompt[..2]).unwrap();
        in_parts.forward(&prompt[2..5]).unwrap();
        let generation = generate(&mut in_parts, 1, &prompt[5..], TOKENS, 4).unwrap();
        assert_eq!(generation.tokens, *expected, "{attention:?}");
    }
    let mut expected = None;
    for attention in [Attention::Stock, Attention::Gqa] {
        check(&PreallocatedCaches, attention, &mut expected);
        check(&ConcatCaches, attention, &mut expected);
        #[cfg(feature = "simulator")]
        {
            let pool = candle_cuda_vmm::TensorPool::new(&Device::Cpu).unwrap();
            check(&pool, attention, &mut expected);
        }
    }
    let all = run(&ConcatCaches, Attention::Gqa, 5, DType::F32).tokens;
    assert_ne!(expected, Some(all), "the window hides tokens");
}

#[test]
fn memory_is_what_the_tensors_take() {
    let token_bytes = token_bytes(&config(), DType::BF16);
    assert_eq!(token_bytes, 2 * 3 * 2 * 8 * 2);
    let preallocated = run(&PreallocatedCaches, Attention::Gqa, 0, DType::BF16);
    let concatenated = run(&ConcatCaches, Attention::Gqa, 0, DType::BF16);
    let cached = |generation: &Generation| -> Vec<usize> {
        let samples = generation.samples.iter();
        samples.map(|sample| sample.cached_tokens).collect()
    };
    assert_eq!(cached(&preallocated), [9, 15, 21, 27, 32]);
    assert_eq!(cached(&concatenated), cached(&preallocated));
    for sample in &preallocated.samples {
        assert_eq!(sample.live_bytes, sample.cached_tokens * token_bytes);
        // 16 tokens at a time.
        let held = sample.cached_tokens.next_multiple_of(16) * token_bytes;
        assert_eq!(sample.held_bytes, held);
    }
    for sample in &concatenated.samples {
        assert_eq!(sample.held_bytes, sample.cached_tokens * token_bytes);
    }
}

#[test]
fn weights_come_from_files_by_name() {
    let folder =
        std::env::temp_dir().join(format!("candle-cuda-vmm-generate-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let (mut first, mut second) = (HashMap::new(), HashMap::new());
    let mut random = Weights::new(Source::Random(7), DType::F32, &Device::Cpu);
    for (name, shape) in names() {
        let tensor = match *shape.as_slice() {
            [size] => random.norm(&name, size),
            [outputs, inputs] => random.matrix(&name, outputs, inputs),
            _ => unreachable!("weights have one dimension or two"),
        };
        let file = match name.contains(".1.") {
            true => &mut first,
            false => &mut second,
        };
        file.insert(name, tensor.unwrap());
    }
    candle_core::safetensors::save(&first, folder.join("model-1.safetensors")).unwrap();
    candle_core::safetensors::save(&second, folder.join("model-2.safetensors")).unwrap();
    std::fs::write(folder.join("config.json"), "{}").unwrap();

    let tensors = read(std::slice::from_ref(&folder)).unwrap();
    assert_eq!(tensors.len(), names().len());
    let weights = Weights::new(Source::Files(tensors), DType::F32, &Device::Cpu);
    let from_files = run_with(&ConcatCaches, Attention::Gqa, weights, 7, 64, DType::F32);
    let from_seed = run(&ConcatCaches, Attention::Gqa, 7, DType::F32);
    assert_eq!(from_files.tokens, from_seed.tokens);

    let new = |tensors| {
        let weights = Weights::new(Source::Files(tensors), DType::F32, &Device::Cpu);
        Decoder::new(&config(), weights, &ConcatCaches, 64, Attention::Gqa).map(|_| ())
    };
    let name = "model.layers.1.mlp.up_proj.weight";
    let mut tensors = read(std::slice::from_ref(&folder)).unwrap();
    tensors.remove(name);
    match new(tensors.clone()).unwrap_err() {
        Error::CannotFindTensor { path } => assert_eq!(path, name),
        other => panic!("{other}"),
    }
    let other = Tensor::zeros((3, 48), DType::F32, &Device::Cpu).unwrap();
    tensors.insert(name.to_owned(), other);
    match new(tensors).unwrap_err() {
        Error::UnexpectedShape { msg, expected, got } => {
            assert_eq!(
                (msg.as_str(), expected.dims(), got.dims()),
                (name, &[96, 48][..], &[3, 48][..])
            );
        }
        other => panic!("{other}"),
    }
    std::fs::remove_dir_all(&folder).unwrap();
}

/// Every weight of the model, as Hugging Face names it.
fn names() -> Vec<(String, Vec<usize>)> {
    let mut names = vec![
        ("model.embed_tokens.weight".to_owned(), vec![160, 48]),
        ("model.norm.weight".to_owned(), vec![48]),
        ("lm_head.weight".to_owned(), vec![160, 48]),
    ];
    for layer in 0..3 {
        for (name, shape) in [
            ("input_layernorm", vec![48]),
            ("self_attn.q_proj", vec![48, 48]),
            ("self_attn.k_proj", vec![16, 48]),
            ("self_attn.v_proj", vec![16, 48]),
            ("self_attn.o_proj", vec![48, 48]),
            ("post_attention_layernorm", vec![48]),
            ("mlp.gate_proj", vec![96, 48]),
            ("mlp.up_proj", vec![96, 48]),
            ("mlp.down_proj", vec![48, 96]),
        ] {
            names.push((format!("model.layers.{layer}.{name}.weight"), shape));
        }
    }
    names
}

#[test]
fn a_model_says_which_weights_it_asks_for_and_is_made_of_those_alone() {
    let config = config();
    let wanted = Model::wanted(&config).unwrap();
    assert_eq!(wanted.joins.len(), 2 * config.num_hidden_layers);
    let name = joined(&wanted.joins[0]);
    let mut tensors: HashMap<_, _> = wanted
        .tensors
        .iter()
        .map(|(name, shape)| {
            (
                name.clone(),
                random(3, name, &shape.clone().into()).unwrap(),
            )
        })
        .collect();
    for parts in &wanted.joins {
        let all: Vec<_> = parts.iter().map(|part| &tensors[part]).collect();
        let all = Tensor::cat(&all, 0).unwrap();
        tensors.insert(joined(parts), all);
    }
    assert!(tensors.contains_key(&name));
    let builder = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
    let logits = |source| {
        let weights = Weights::new(source, DType::F32, &Device::Cpu);
        let model = Model::new(&config, weights).unwrap();
        let tokens = Tensor::new(&[1u32, 5, 9], &Device::Cpu).unwrap();
        let hidden = model.hidden(&tokens, |_, new| new.q.contiguous()).unwrap();
        model.logits(&hidden).unwrap().to_vec2::<f32>().unwrap()
    };
    assert_eq!(logits(Source::Built(builder)), logits(Source::Random(3)));
}
