//! What a client asks for, once all of it is checked.

use crate::api::body::{Body, ChatMessage, Content, Part, Prompt, Stop};
use crate::api::error::ApiError;
use crate::api::reply::Kind;
use crate::request::{ModelInfo, Sampling};
use crate::text::{Message, TemplateError};

/// How many tokens a completion without a chat gets if the client says nothing, as at OpenAI.
const COMPLETION_TOKENS: usize = 16;

const STOPS_MAX: usize = 4;
const STOP_BYTES_MAX: usize = 1024;

/// A request whose parameters are in their ranges.
#[derive(Debug)]
pub struct Ask {
    pub kind: Kind,
    pub model: String,
    pub input: Input,
    pub max_tokens: usize,
    pub sampling: Sampling,
    pub stop: Vec<String>,
    pub is_streamed: bool,
    pub include_usage: bool,
    pub ignores_stop_ids: bool,
    pub returns_token_ids: bool,
}

/// What to go on from.
#[derive(Debug)]
pub enum Input {
    Text(String),
    Ids(Vec<u32>),
    Chat(Vec<Message>),
}

impl Ask {
    /// Checks the parameters of a body, in the order in which OpenAI documents them.
    pub fn of_body(kind: Kind, body: Body) -> Result<Self, ApiError> {
        let missing = |param| ApiError::parameter(param, "it is required");
        let model = body.model.ok_or_else(|| missing("model"))?;
        let input = match kind {
            Kind::Text => prompt(body.prompt.ok_or_else(|| missing("prompt"))?)?,
            Kind::Chat => chat(body.messages.ok_or_else(|| missing("messages"))?)?,
        };
        let [old, new] = [
            ("max_tokens", body.max_tokens),
            ("max_completion_tokens", body.max_completion_tokens),
        ];
        if let Some((param, _)) = [old, new].iter().find(|it| it.1 == Some(0)) {
            return Err(ApiError::parameter(*param, "it must be at least 1"));
        }
        let unlimited = match kind {
            Kind::Text => COMPLETION_TOKENS,
            Kind::Chat => usize::MAX,
        };
        let is_streamed = body.stream.unwrap_or(false);
        if body.stream_options.is_some() && !is_streamed {
            let problem = "it is only for a request with 'stream'";
            return Err(ApiError::parameter("stream_options", problem));
        }
        if body.n.is_some_and(|n| n != 1) {
            return Err(ApiError::parameter("n", "it must be 1"));
        }
        let options = body.stream_options.as_ref();
        let include_usage = options.and_then(|options| options.include_usage);
        Ok(Self {
            kind,
            model,
            input,
            max_tokens: new.1.or(old.1).unwrap_or(unlimited),
            sampling: sampling(body.temperature, body.top_p, body.seed)?,
            stop: stop(body.stop)?,
            is_streamed,
            include_usage: include_usage.unwrap_or(false),
            ignores_stop_ids: body.ignore_eos.unwrap_or(false),
            returns_token_ids: body.return_token_ids.unwrap_or(false),
        })
    }

    /// The tokens of the prompt. It takes long if that is long.
    pub fn prompt(&self, model: &ModelInfo) -> Result<Vec<u32>, ApiError> {
        let param = self.kind.param();
        let ids = match &self.input {
            Input::Text(text) => model.tokenizer.encode(text, true),
            Input::Ids(ids) => match ids.iter().find(|id| !model.tokenizer.has(**id)) {
                Some(id) => {
                    let problem = format!("the model has no token {id}");
                    return Err(ApiError::parameter(param, problem));
                }
                None => Ok(ids.clone()),
            },
            Input::Chat(messages) => {
                let text = model
                    .template
                    .render(messages)
                    .map_err(|error| match error {
                        TemplateError::Refused(problem) => ApiError::parameter(param, problem),
                        error => ApiError::failed(error),
                    })?;
                model.tokenizer.encode(&text, false)
            }
        };
        let ids = ids.map_err(ApiError::failed)?;
        match ids.is_empty() {
            true => Err(ApiError::parameter(param, "it has no tokens")),
            false => Ok(ids),
        }
    }
}

fn prompt(prompt: Prompt) -> Result<Input, ApiError> {
    let one = |count: usize| match count {
        1 => Ok(()),
        _ => Err(ApiError::parameter("prompt", "it must be one prompt")),
    };
    Ok(match prompt {
        Prompt::Text(text) => Input::Text(text),
        Prompt::Ids(ids) => Input::Ids(ids),
        Prompt::Texts(texts) => {
            one(texts.len())?;
            Input::Text(texts.concat())
        }
        Prompt::Lists(lists) => {
            one(lists.len())?;
            Input::Ids(lists.concat())
        }
    })
}

fn chat(messages: Vec<ChatMessage>) -> Result<Input, ApiError> {
    if messages.is_empty() {
        let problem = "there must be at least one";
        return Err(ApiError::parameter("messages", problem));
    }
    let messages = messages.into_iter().map(|message| Message {
        role: message.role,
        content: match message.content {
            Content::Text(text) => text,
            Content::Parts(parts) => {
                let texts = parts.into_iter().map(|Part::Text { text }| text);
                texts.collect()
            }
        },
    });
    Ok(Input::Chat(messages.collect()))
}

fn sampling(
    temperature: Option<f32>,
    top_p: Option<f32>,
    seed: Option<i64>,
) -> Result<Sampling, ApiError> {
    let (temperature, top_p) = (temperature.unwrap_or(1.0), top_p.unwrap_or(1.0));
    if !(0.0..=2.0).contains(&temperature) {
        return Err(ApiError::parameter("temperature", "it must be from 0 to 2"));
    }
    if !(top_p > 0.0 && top_p <= 1.0) {
        let problem = "it must be above 0, and at most 1";
        return Err(ApiError::parameter("top_p", problem));
    }
    Ok(Sampling {
        temperature,
        top_p,
        seed: seed.map(i64::cast_unsigned),
    })
}

fn stop(stop: Option<Stop>) -> Result<Vec<String>, ApiError> {
    let strings = match stop {
        None => Vec::new(),
        Some(Stop::One(string)) => vec![string],
        Some(Stop::Several(strings)) => strings,
    };
    let is_right = |string: &String| (1..=STOP_BYTES_MAX).contains(&string.len());
    if strings.len() > STOPS_MAX || !strings.iter().all(is_right) {
        let problem = format!("at most {STOPS_MAX} strings, of 1 to {STOP_BYTES_MAX} bytes each");
        return Err(ApiError::parameter("stop", problem));
    }
    Ok(strings)
}
