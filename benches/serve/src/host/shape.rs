//! What a model is: a shape with random weights, or a folder with a model's files.

use crate::config::Config;
use crate::model::Model;
use crate::text::{ChatTemplate, Tokenizer};
use crate::weights::{self, Source, Weights};
use candle_core::{DType, Device};
use candle_cuda_vmm::{ElasticWeights, HostStore, Result, TensorPool, WeightsOptions};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// For tests and first tries.
const TINY: &str = r#"{ "vocab_size": 264, "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 2048 }"#;

/// For measuring on the CPU: K and V are large beside what is computed. They take 32 KiB for a
/// token, in two tensors, so that a page holds 128 tokens.
const WIDE: &str = r#"{ "vocab_size": 264, "hidden_size": 128, "intermediate_size": 512,
    "num_hidden_layers": 1, "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 256,
    "max_position_embeddings": 1024 }"#;

/// The shape of Llama 3.2 1B.
const LLAMA_1B: &str = r#"{ "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
    "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    "tie_word_embeddings": true, "rope_theta": 500000.0, "max_position_embeddings": 16384 }"#;

/// The shape of Llama 3.2 3B.
const LLAMA_3B: &str = r#"{ "vocab_size": 128256, "hidden_size": 3072, "intermediate_size": 8192,
    "num_hidden_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128,
    "tie_word_embeddings": true, "rope_theta": 500000.0, "max_position_embeddings": 16384 }"#;

/// Why a model cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum ShapeError {
    /// It is neither a shape nor a folder.
    #[error("{0} is no shape (tiny, wide, 1b, 3b), and no folder with a config.json")]
    Unknown(String),
    /// A file of the folder cannot be read.
    #[error("{}: {error}", .path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        error: String,
    },
}

/// What a model is.
#[derive(Clone, Debug)]
pub struct Shape {
    /// The sizes.
    pub config: Config,
    /// Where its weights are; random ones with this seed if nowhere.
    folder: Option<PathBuf>,
    seed: u64,
    /// The type of weights, K and V.
    pub dtype: DType,
    /// Turns text into tokens and back.
    pub tokenizer: Arc<Tokenizer>,
    /// Turns a chat into the text of a prompt.
    pub template: Arc<ChatTemplate>,
    /// Tokens that end a text.
    pub stop_ids: Vec<u32>,
}

impl Shape {
    /// Reads what a model is: `tiny`, `wide`, `1b`, `3b`, or a folder. Weights are read later.
    ///
    /// # Errors
    ///
    /// Which file cannot be read, and why.
    pub fn read(text: &str, seed: u64, dtype: DType) -> core::result::Result<Self, ShapeError> {
        let config = match text {
            "tiny" => TINY,
            "wide" => WIDE,
            "1b" => LLAMA_1B,
            "3b" => LLAMA_3B,
            folder => return Self::of_folder(Path::new(folder), dtype),
        };
        Self::random(config, seed, dtype)
    }

    /// A model with random weights, of the sizes that the text of a `config.json` says. Bytes are
    /// its tokens.
    ///
    /// # Errors
    ///
    /// What is wrong with the text.
    pub fn random(config: &str, seed: u64, dtype: DType) -> core::result::Result<Self, ShapeError> {
        let config = Config::parse(config).map_err(|error| ShapeError::File {
            path: "config.json".into(),
            error: error.to_string(),
        })?;
        Ok(Self {
            config,
            folder: None,
            seed,
            dtype,
            tokenizer: Arc::new(Tokenizer::bytes()),
            template: Arc::new(ChatTemplate::plain()),
            stop_ids: vec![crate::text::BYTES_END_OF_TEXT],
        })
    }

    fn of_folder(folder: &Path, dtype: DType) -> core::result::Result<Self, ShapeError> {
        let file = |name: &str| folder.join(name);
        if !file("config.json").is_file() {
            return Err(ShapeError::Unknown(folder.display().to_string()));
        }
        let failed = |name: &str, error: String| ShapeError::File {
            path: file(name),
            error,
        };
        let read = |name: &str| {
            std::fs::read_to_string(file(name)).map_err(|error| failed(name, error.to_string()))
        };
        let config = Config::read(&file("config.json"));
        let config = config.map_err(|error| failed("config.json", error.to_string()))?;
        let tokenizer = Tokenizer::from_json(read("tokenizer.json")?.as_bytes());
        let tokenizer = tokenizer.map_err(|error| failed("tokenizer.json", error.to_string()))?;
        let given = |name: &str| file(name).is_file().then(|| read(name)).transpose();
        let template = match given("tokenizer_config.json")? {
            Some(text) => ChatTemplate::from_config(&text, given("chat_template.jinja")?)
                .map_err(|error| failed("tokenizer_config.json", error.to_string()))?,
            None => None,
        };
        let template = template.unwrap_or_else(ChatTemplate::plain);
        let stop_ids = stop_ids(&read("config.json")?);
        Ok(Self {
            config,
            folder: Some(folder.to_owned()),
            seed: 0,
            dtype,
            tokenizer: Arc::new(tokenizer),
            template: Arc::new(template),
            stop_ids,
        })
    }

    /// Reads the weights, or makes them.
    pub(super) fn weights(&self, device: &Device) -> candle_core::Result<Weights> {
        let source = match &self.folder {
            Some(folder) => Source::Files(weights::read(std::slice::from_ref(folder))?),
            None => Source::Random(self.seed),
        };
        Ok(Weights::new(source, self.dtype, device))
    }
}

impl Shape {
    /// Reads the weights into memory of a pool, or makes them, in this type, with the matrices that
    /// multiply the same joined.
    pub(super) fn elastic_weights(
        &self,
        pool: &TensorPool,
        store: &HostStore,
    ) -> Result<ElasticWeights> {
        let wanted = Model::wanted(&self.config)?;
        let options = WeightsOptions::new().dtype(self.dtype);
        let options = wanted.joins.into_iter().fold(options, |options, parts| {
            options.join(weights::joined(&parts), parts)
        });
        if let Some(folder) = &self.folder {
            return ElasticWeights::load(pool, store, &weights::files(folder)?, options);
        }
        let (seed, dtype) = (self.seed, self.dtype);
        let tensors = wanted.tensors.into_iter();
        let tensors = tensors.map(|(name, shape)| (name, shape, dtype));
        let make = move |name: &str, shape: &_| weights::random(seed, name, shape);
        ElasticWeights::make(pool, store, tensors, options, make)
    }
}

/// The `eos_token_id` of a `config.json`: a number, or several.
fn stop_ids(config: &str) -> Vec<u32> {
    let config: serde_json::Value = serde_json::from_str(config).unwrap_or_default();
    let ids = &config["eos_token_id"];
    let id = |id: &serde_json::Value| id.as_u64().and_then(|id| u32::try_from(id).ok());
    match ids.as_array() {
        Some(ids) => ids.iter().filter_map(id).collect(),
        None => id(ids).into_iter().collect(),
    }
}
