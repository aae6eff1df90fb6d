//! The model's configuration, in the format of Hugging Face's `config.json`.

use serde::Deserialize;
use std::path::{Path, PathBuf};

/// The fields that define a Llama-shaped model. Others are ignored, unless they require another
/// kind of model.
#[derive(Clone, Debug, Deserialize, PartialEq)]
pub struct Config {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    /// Default: the number of attention heads.
    num_key_value_heads: Option<usize>,
    /// Default: `hidden_size / num_attention_heads`.
    head_dim: Option<usize>,
    #[serde(default = "default_rms_norm_eps")]
    pub rms_norm_eps: f32,
    #[serde(default = "default_rope_theta")]
    pub rope_theta: f32,
    pub rope_scaling: Option<RopeScaling>,
    #[serde(default = "default_max_position_embeddings")]
    pub max_position_embeddings: usize,
    #[serde(default)]
    pub tie_word_embeddings: bool,
    model_type: Option<String>,
    hidden_act: Option<String>,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    /// The keys that a query sees: its own and those before it. Default: all.
    pub sliding_window: Option<usize>,
    rope_parameters: Option<serde_json::Value>,
}

/// Scaling of positions beyond those of the original training.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq)]
#[serde(tag = "rope_type", rename_all = "lowercase")]
pub enum RopeScaling {
    /// No scaling.
    Default,
    /// Divides low frequencies by `factor`, keeps high ones, and interpolates between them.
    Llama3 {
        factor: f32,
        low_freq_factor: f32,
        high_freq_factor: f32,
        original_max_position_embeddings: usize,
    },
}

impl RopeScaling {
    /// Returns the scaling's numbers with the names of their fields.
    fn numbers(&self) -> Vec<(&'static str, f32)> {
        match *self {
            Self::Default => Vec::new(),
            Self::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings: original,
            } => vec![
                ("factor", factor),
                ("low_freq_factor", low_freq_factor),
                ("high_freq_factor", high_freq_factor),
                ("original_max_position_embeddings", original as f32),
            ],
        }
    }
}

/// A limit far above any model's sizes, except for its number of tokens.
const LARGEST: usize = 1 << 24;

fn default_rms_norm_eps() -> f32 {
    1e-6
}

fn default_rope_theta() -> f32 {
    10_000.
}

fn default_max_position_embeddings() -> usize {
    2048
}

/// Why a configuration cannot be used.
#[derive(Debug)]
pub enum ConfigError {
    /// The file cannot be read.
    File(PathBuf, std::io::Error),
    /// The text is not the JSON of a configuration: a field is missing or has another type.
    Json(serde_json::Error),
    /// The value of a field is invalid.
    Invalid {
        field: &'static str,
        value: usize,
        reason: &'static str,
    },
    /// The number in a field is invalid.
    NotANumber {
        field: &'static str,
        value: f32,
        reason: &'static str,
    },
    /// The number of weights overflows.
    TooLarge,
    /// A field requires a feature that this model does not have.
    Unsupported { field: &'static str, value: String },
}

impl std::fmt::Display for ConfigError {
    fn fmt(&self, to: &mut std::fmt::Formatter) -> std::fmt::Result {
        match self {
            Self::File(path, error) => write!(to, "{}: {error}", path.display()),
            Self::Json(error) => write!(to, "the configuration: {error}"),
            Self::Invalid {
                field,
                value,
                reason,
            } => write!(to, "{field} is {value}; {reason}"),
            Self::NotANumber {
                field,
                value,
                reason,
            } => write!(to, "{field} is {value}; {reason}"),
            Self::TooLarge => {
                write!(to, "the number of the model's weights overflows")
            }
            Self::Unsupported { field, value } => {
                write!(to, "{field} is {value}, which this model does not have")
            }
        }
    }
}

impl std::error::Error for ConfigError {}

impl Config {
    /// Reads a configuration file.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|error| ConfigError::File(path.to_owned(), error))?;
        Self::parse(&text)
    }

    /// Parses a configuration.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let config: Self = serde_json::from_str(text).map_err(ConfigError::Json)?;
        config.check()?;
        Ok(config)
    }

    /// Returns a small model, which generates some tokens per second on two cores.
    pub fn small() -> Result<Self, ConfigError> {
        Self::parse(include_str!("small.json"))
    }

    pub fn kv_heads(&self) -> usize {
        self.num_key_value_heads.unwrap_or(self.num_attention_heads)
    }

    pub fn head_dim(&self) -> usize {
        self.head_dim
            .unwrap_or(self.hidden_size / self.num_attention_heads)
    }

    /// Returns the number of elements of all weights and rotary tables; `None` if their size in F32
    /// overflows.
    pub fn elements(&self) -> Option<usize> {
        let times = |factors: &[usize]| {
            (factors.iter()).try_fold(1_usize, |all, factor| all.checked_mul(*factor))
        };
        let queries = times(&[self.num_attention_heads, self.head_dim()])?;
        let keys = times(&[self.kv_heads(), self.head_dim()])?;
        // Queries and output; keys and values; gate, up and down; two norms.
        let rows = [queries, queries, keys, keys]
            .into_iter()
            .chain([self.intermediate_size; 3])
            .chain([1, 1])
            .try_fold(0_usize, usize::checked_add)?;
        let layers = times(&[rows, self.hidden_size, self.num_hidden_layers])?;
        let tables = if self.tie_word_embeddings { 1 } else { 2 };
        let tables = times(&[tables, self.vocab_size, self.hidden_size])?;
        let rotations = times(&[self.max_position_embeddings, self.head_dim()])?;
        let all = [layers, tables, rotations, self.hidden_size];
        let all = all.into_iter().try_fold(0_usize, usize::checked_add)?;
        // Candle counts bytes, and an allocation has at most `isize::MAX`.
        let bytes = all.checked_mul(size_of::<f32>())?;
        (bytes <= isize::MAX as usize).then_some(all)
    }

    fn check(&self) -> Result<(), ConfigError> {
        for (field, value, most) in [
            // Tokens are 32-bit numbers.
            ("vocab_size", self.vocab_size, u32::MAX as usize),
            ("hidden_size", self.hidden_size, LARGEST),
            ("intermediate_size", self.intermediate_size, LARGEST),
            ("num_hidden_layers", self.num_hidden_layers, LARGEST),
            ("num_attention_heads", self.num_attention_heads, LARGEST),
            ("num_key_value_heads", self.kv_heads(), LARGEST),
            (
                "max_position_embeddings",
                self.max_position_embeddings,
                u32::MAX as usize,
            ),
        ] {
            let reason = match value {
                0 => "it must be at least 1",
                value if value > most => "that is more than any model has",
                _ => continue,
            };
            return Err(ConfigError::Invalid {
                field,
                value,
                reason,
            });
        }
        for (field, value) in [
            ("rms_norm_eps", self.rms_norm_eps),
            ("rope_theta", self.rope_theta),
        ]
        .into_iter()
        .chain(self.rope_scaling.iter().flat_map(RopeScaling::numbers))
        {
            if !(value.is_finite() && value > 0.) {
                let reason = "it must be a number above 0";
                return Err(ConfigError::NotANumber {
                    field,
                    value,
                    reason,
                });
            }
        }
        if let Some(RopeScaling::Llama3 {
            low_freq_factor,
            high_freq_factor,
            ..
        }) = self.rope_scaling
            && high_freq_factor <= low_freq_factor
        {
            return Err(ConfigError::NotANumber {
                field: "high_freq_factor",
                value: high_freq_factor,
                reason: "it must be above low_freq_factor",
            });
        }
        let invalid = |field, value, reason| {
            Err(ConfigError::Invalid {
                field,
                value,
                reason,
            })
        };
        if !self.num_attention_heads.is_multiple_of(self.kv_heads()) {
            let reason = "it must divide num_attention_heads";
            return invalid("num_key_value_heads", self.kv_heads(), reason);
        }
        if self.head_dim.is_none() && !self.hidden_size.is_multiple_of(self.num_attention_heads) {
            let reason = "without head_dim, num_attention_heads must divide it";
            return invalid("hidden_size", self.hidden_size, reason);
        }
        if self.head_dim() == 0 || !self.head_dim().is_multiple_of(2) {
            return invalid("head_dim", self.head_dim(), "it must be even, and not 0");
        }
        if self.head_dim() > LARGEST {
            let reason = "that is more than any model has";
            return invalid("head_dim", self.head_dim(), reason);
        }
        let unsupported = |field, value: &dyn std::fmt::Display| {
            let value = value.to_string();
            Err(ConfigError::Unsupported { field, value })
        };
        match (&self.model_type, &self.hidden_act) {
            (Some(other), _) if !["llama", "mistral"].contains(&other.as_str()) => {
                return unsupported("model_type", other);
            }
            (_, Some(other)) if other != "silu" => return unsupported("hidden_act", other),
            _ => {}
        }
        for (field, set) in [
            ("attention_bias", self.attention_bias),
            ("mlp_bias", self.mlp_bias),
        ] {
            if set {
                return unsupported(field, &set);
            }
        }
        if self.sliding_window == Some(0) {
            return invalid("sliding_window", 0, "a query sees its own key at least");
        }
        // Newer files have rope_theta and rope_scaling here. Ignoring it would change the model.
        if let Some(parameters) = &self.rope_parameters {
            return unsupported("rope_parameters", parameters);
        }
        match self.elements() {
            Some(_) => Ok(()),
            None => Err(ConfigError::TooLarge),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn with(field: &str, value: Value) -> Result<Config, ConfigError> {
        let mut config: Value = serde_json::from_str(include_str!("small.json")).unwrap();
        config[field] = value;
        Config::parse(&config.to_string())
    }

    #[test]
    fn what_is_not_there_has_the_usual_value() {
        let config = Config::parse(
            r#"{ "vocab_size": 10, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
                 "num_attention_heads": 4, "architectures": ["LlamaForCausalLM"] }"#,
        )
        .unwrap();
        assert_eq!((config.kv_heads(), config.head_dim()), (4, 8));
        assert_eq!((config.rms_norm_eps, config.rope_theta), (1e-6, 10_000.));
        assert_eq!(config.max_position_embeddings, 2048);
        assert!(!config.tie_word_embeddings && config.rope_scaling.is_none());
    }

    #[test]
    fn what_is_there_is_taken() {
        let scaling = json!({ "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192 });
        assert_eq!(
            with("rope_scaling", scaling).unwrap().rope_scaling,
            Some(RopeScaling::Llama3 {
                factor: 32.,
                low_freq_factor: 1.,
                high_freq_factor: 4.,
                original_max_position_embeddings: 8192
            })
        );
        assert_eq!(with("head_dim", json!(128)).unwrap().head_dim(), 128);
        assert_eq!(with("rope_theta", json!(5e5)).unwrap().rope_theta, 5e5);
        assert!(with("sliding_window", Value::Null).is_ok());
        let window = with("sliding_window", json!(4096)).unwrap().sliding_window;
        assert_eq!(window, Some(4096));
        assert!(with("model_type", json!("mistral")).is_ok());
    }

    #[test]
    fn what_is_missing_or_of_another_type_is_named() {
        for (text, name) in [
            ("{", "EOF"),
            ("{}", "vocab_size"),
            (r#"{ "vocab_size": "ten" }"#, "ten"),
        ] {
            match Config::parse(text).unwrap_err() {
                ConfigError::Json(error) => assert!(error.to_string().contains(name), "{error}"),
                other => panic!("{other:?}"),
            }
        }
        let scaling = json!({ "rope_type": "yarn", "factor": 2.0 });
        match with("rope_scaling", scaling).unwrap_err() {
            ConfigError::Json(error) => assert!(error.to_string().contains("yarn"), "{error}"),
            other => panic!("{other:?}"),
        }
        let path = Path::new("there/is/no/such/config.json");
        match Config::read(path).unwrap_err() {
            ConfigError::File(named, error) => {
                assert_eq!(named, path);
                assert_eq!(error.kind(), std::io::ErrorKind::NotFound);
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_cannot_be_is_refused_with_its_value() {
        for (name, bad) in [
            ("vocab_size", 0),
            ("num_hidden_layers", 0),
            ("num_attention_heads", 0),
            ("num_key_value_heads", 0),
            ("num_key_value_heads", 3),
            ("head_dim", 7),
            ("hidden_size", 33),
        ] {
            match with(name, json!(bad)).unwrap_err() {
                ConfigError::Invalid { field, value, .. } => {
                    assert_eq!((field, value), (name, bad))
                }
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn what_is_absurd_is_refused_at_once() {
        for name in [
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        ] {
            for bad in [0, usize::MAX, usize::MAX - 1, 1 << 40] {
                match with(name, json!(bad)).unwrap_err() {
                    ConfigError::Invalid { field, value, .. } => {
                        assert_eq!((field, value), (name, bad))
                    }
                    other => panic!("{other:?}"),
                }
            }
        }
        for name in ["rms_norm_eps", "rope_theta"] {
            for bad in [json!(0.0), json!(-1.0), json!(1e300)] {
                match with(name, bad).unwrap_err() {
                    ConfigError::NotANumber { field, value, .. } => {
                        assert_eq!(field, name);
                        assert!(!(value.is_finite() && value > 0.));
                    }
                    other => panic!("{other:?}"),
                }
            }
            // JSON cannot express this number.
            with(name, json!(f64::NAN)).unwrap_err();
        }
        let scaling = |factor: f64, low: f64, high: f64, original: usize| {
            json!({ "rope_type": "llama3", "factor": factor, "low_freq_factor": low,
                    "high_freq_factor": high, "original_max_position_embeddings": original })
        };
        for (bad, name) in [
            (scaling(0., 1., 4., 8192), "factor"),
            (scaling(8., -1., 4., 8192), "low_freq_factor"),
            (scaling(8., 4., 4., 8192), "high_freq_factor"),
            (scaling(8., 1., 4., 0), "original_max_position_embeddings"),
        ] {
            match with("rope_scaling", bad).unwrap_err() {
                ConfigError::NotANumber { field, .. } => assert_eq!(field, name),
                other => panic!("{other:?}"),
            }
        }
        // Each of these is valid alone, but not together.
        let mut huge: Value = serde_json::from_str(include_str!("small.json")).unwrap();
        for name in ["hidden_size", "intermediate_size", "num_hidden_layers"] {
            huge[name] = json!(1 << 23);
        }
        let outcome = Config::parse(&huge.to_string());
        assert!(matches!(outcome, Err(ConfigError::TooLarge)), "{outcome:?}");
    }

    #[test]
    fn weights_are_counted() {
        // 8 layers of 2 512 × 512, 2 512 × 128, 3 512 × 1408 and 2 512, a table, a norm, the
        // rotations.
        let layer = 2 * 512 * 512 + 2 * 512 * 128 + 3 * 512 * 1408 + 2 * 512;
        let all = 8 * layer + 4096 * 512 + 512 + 4096 * 64;
        assert_eq!(Config::small().unwrap().elements(), Some(all));
    }

    #[test]
    fn what_this_model_has_not_is_refused_with_its_value() {
        for (name, asked, text) in [
            ("model_type", json!("gpt2"), "gpt2"),
            ("hidden_act", json!("gelu"), "gelu"),
            ("attention_bias", json!(true), "true"),
            ("mlp_bias", json!(true), "true"),
            (
                "rope_parameters",
                json!({ "rope_theta": 1 }),
                r#"{"rope_theta":1}"#,
            ),
        ] {
            match with(name, asked).unwrap_err() {
                ConfigError::Unsupported { field, value } => {
                    assert_eq!((field, value.as_str()), (name, text));
                }
                other => panic!("{other:?}"),
            }
        }
    }
}
