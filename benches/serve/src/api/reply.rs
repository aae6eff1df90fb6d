//! The objects of a response, whole or in chunks.

use crate::api::generation::Usage;
use crate::request::FinishReason;
use serde_json::{Value, json};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

/// The endpoint that a request came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `/v1/completions`
    Text,
    /// `/v1/chat/completions`
    Chat,
}

impl Kind {
    /// The parameter that has the prompt.
    pub fn param(self) -> &'static str {
        match self {
            Self::Text => "prompt",
            Self::Chat => "messages",
        }
    }
}

/// Makes the objects of one response.
#[derive(Debug)]
pub struct Reply {
    kind: Kind,
    id: String,
    created: u64,
    model: String,
    /// Whether chunks say how many tokens there were: the last one does, the others have a null.
    include_usage: bool,
    /// Whether each choice says which tokens it has.
    includes_token_ids: bool,
}

impl Reply {
    /// A response to a request for a model, with an identifier of its own.
    pub fn new(kind: Kind, model: String, include_usage: bool, includes_token_ids: bool) -> Self {
        static FIRST: LazyLock<u128> = LazyLock::new(|| since_1970().as_nanos());
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let prefix = match kind {
            Kind::Text => "cmpl",
            Kind::Chat => "chatcmpl",
        };
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        Self {
            kind,
            id: format!("{prefix}-{:x}-{count:x}", *FIRST),
            created: since_1970().as_secs(),
            model,
            include_usage,
            includes_token_ids,
        }
    }

    /// The whole response.
    pub fn whole(&self, text: &str, ids: &[u32], reason: FinishReason, usage: Usage) -> Value {
        let (object, name, value) = match self.kind {
            Kind::Text => ("text_completion", "text", json!(text)),
            Kind::Chat => {
                let message = json!({ "role": "assistant", "content": text, "refusal": null });
                ("chat.completion", "message", message)
            }
        };
        let mut object = self.object(object, vec![self.choice(name, value, ids, Some(reason))]);
        object["usage"] = numbers(usage);
        object
    }

    /// The first chunk, if there is one before the text.
    pub fn opening(&self) -> Option<Value> {
        let delta = json!({ "role": "assistant", "content": "", "refusal": null });
        let choice = self.choice("delta", delta, &[], None);
        (self.kind == Kind::Chat).then(|| self.chunk(vec![choice]))
    }

    /// A chunk of text.
    pub fn piece(&self, text: &str, ids: &[u32]) -> Value {
        self.chunk(vec![match self.kind {
            Kind::Text => self.choice("text", json!(text), ids, None),
            Kind::Chat => self.choice("delta", json!({ "content": text }), ids, None),
        }])
    }

    /// The chunk after the text.
    pub fn end(&self, reason: FinishReason) -> Value {
        self.chunk(vec![match self.kind {
            Kind::Text => self.choice("text", json!(""), &[], Some(reason)),
            Kind::Chat => self.choice("delta", json!({}), &[], Some(reason)),
        }])
    }

    /// The chunk that says how many tokens there were, if that is wanted.
    pub fn usage(&self, usage: Usage) -> Option<Value> {
        self.include_usage.then(|| {
            let mut chunk = self.chunk(Vec::new());
            chunk["usage"] = numbers(usage);
            chunk
        })
    }

    fn chunk(&self, choices: Vec<Value>) -> Value {
        let object = match self.kind {
            Kind::Text => "text_completion",
            Kind::Chat => "chat.completion.chunk",
        };
        let mut chunk = self.object(object, choices);
        if self.include_usage {
            chunk["usage"] = Value::Null;
        }
        chunk
    }

    fn choice(&self, name: &str, value: Value, ids: &[u32], reason: Option<FinishReason>) -> Value {
        let reason = reason.map(|reason| match reason {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
        });
        let mut choice =
            json!({ "index": 0, name: value, "logprobs": null, "finish_reason": reason });
        if self.includes_token_ids {
            choice["token_ids"] = json!(ids);
        }
        choice
    }

    fn object(&self, object: &str, choices: Vec<Value>) -> Value {
        json!({
            "id": self.id, "object": object, "created": self.created, "model": self.model,
            "choices": choices,
        })
    }
}

fn numbers(usage: Usage) -> Value {
    json!({
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
    })
}

fn since_1970() -> std::time::Duration {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.unwrap_or_default()
}
