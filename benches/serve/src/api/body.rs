//! The body of a request, as clients send it. What is null is as if it were not there.

use crate::api::error::ApiError;
use crate::text::Role;
use serde::Deserialize;

/// The parameters of both endpoints. Others are ignored.
#[derive(Debug, Deserialize)]
pub struct Body {
    pub model: Option<String>,
    pub prompt: Option<Prompt>,
    pub messages: Option<Vec<ChatMessage>>,
    pub max_tokens: Option<usize>,
    pub max_completion_tokens: Option<usize>,
    pub temperature: Option<f32>,
    pub top_p: Option<f32>,
    pub seed: Option<i64>,
    pub stop: Option<Stop>,
    pub n: Option<u64>,
    pub stream: Option<bool>,
    pub stream_options: Option<StreamOptions>,
    /// No token ends the text. An extension, as vLLM has it.
    pub ignore_eos: Option<bool>,
    /// The tokens are told too. An extension, as vLLM has it.
    pub return_token_ids: Option<bool>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "expected a string or an array of token ids")]
pub enum Prompt {
    Text(String),
    Ids(Vec<u32>),
    Texts(Vec<String>),
    Lists(Vec<Vec<u32>>),
}

#[derive(Debug, Deserialize)]
pub struct ChatMessage {
    pub role: Role,
    pub content: Content,
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "expected a string or an array of text parts")]
pub enum Content {
    Text(String),
    Parts(Vec<Part>),
}

/// A part of a message. Only text is taken.
#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum Part {
    Text { text: String },
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "expected a string or an array of strings")]
pub enum Stop {
    One(String),
    Several(Vec<String>),
}

#[derive(Debug, Deserialize)]
pub struct StreamOptions {
    pub include_usage: Option<bool>,
}

impl Body {
    /// Reads the JSON. An error names the parameter that has another type.
    pub fn parse(json: &[u8]) -> Result<Self, ApiError> {
        // An array would be taken for the parameters in their order.
        if json.trim_ascii_start().first() != Some(&b'{') {
            let problem = "it is no JSON object".to_owned();
            return Err(ApiError::Malformed(problem));
        }
        let mut json = serde_json::Deserializer::from_slice(json);
        let body = serde_path_to_error::deserialize(&mut json).map_err(|error| {
            let path = error.path().to_string();
            let problem = error.into_inner();
            match problem.is_data() && path != "." {
                true => ApiError::parameter(path, problem),
                false => ApiError::Malformed(problem.to_string()),
            }
        })?;
        let end = json.end();
        end.map_err(|error| ApiError::Malformed(error.to_string()))?;
        Ok(body)
    }
}
