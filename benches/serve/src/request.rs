//! What the server asks of an engine, and what an engine gives back.

use crate::figures::Figures;
use crate::text::{ChatTemplate, Tokenizer};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Semaphore, mpsc, oneshot};

/// Tells how a sleep or a wake has ended. An error says that the model has ended.
pub type Ended = oneshot::Receiver<Result<(), Refusal>>;

/// An engine, as the server sees it.
///
/// The server calls it from the threads that serve all connections, so nothing in it may wait for
/// long.
pub trait Backend: Send + Sync {
    /// The models that it serves.
    fn models(&self) -> Vec<ModelInfo>;

    /// The model of this name, if it serves that.
    fn model(&self, id: &str) -> Option<ModelInfo> {
        self.models().into_iter().find(|model| model.id == id)
    }

    /// Begins to generate, now or once there is room.
    ///
    /// The receiver gets a token after the other, then one [`Event::End`] or [`Event::Failed`]; or
    /// [`Event::Refused`] alone. Who
    /// drops it wants no more: the engine learns of it by an error when it sends, or by
    /// [`mpsc::Sender::is_closed`]. [`Generate::channel`] makes a channel that holds every event, so
    /// that the engine never waits for a slow reader.
    fn submit(&self, model: &str, ask: Generate) -> Result<mpsc::Receiver<Event>, Refusal>;

    /// Has a model sleep. It does if it has no requests, or sleeps already.
    fn sleep(&self, model: &str) -> Result<Ended, Refusal> {
        _ = model;
        Err(Refusal::NeverSleeps)
    }

    /// Wakes a model, once there is room. Who drops the receiver wants it no more.
    fn wake(&self, model: &str) -> Result<Ended, Refusal> {
        _ = model;
        Err(Refusal::NeverSleeps)
    }

    /// The memory and the work of its models at present. The server asks several times a second.
    fn figures(&self) -> Figures;

    /// Its figures, in the text format of Prometheus.
    fn metrics(&self) -> String;

    /// Whether it can still generate.
    fn is_healthy(&self) -> bool;
}

/// A model, and what turns text into its tokens.
#[derive(Clone, Debug)]
pub struct ModelInfo {
    /// The name that requests give.
    pub id: String,
    /// When it was made or loaded, in seconds since 1970.
    pub created: u64,
    /// How many tokens a prompt and what is generated after it may have together.
    pub context_tokens_max: usize,
    /// Tokens that end a text.
    pub stop_ids: Vec<u32>,
    /// Turns text into tokens and back.
    pub tokenizer: Arc<Tokenizer>,
    /// Turns a chat into the text of a prompt.
    pub template: Arc<ChatTemplate>,
    /// Whether it sleeps. A request wakes it.
    pub is_asleep: bool,
}

/// A prompt, and how to go on from it.
#[derive(Clone, Debug, PartialEq)]
pub struct Generate {
    /// The prompt, of at least one token.
    pub prompt: Vec<u32>,
    /// How many tokens to generate at most; at least one.
    pub max_tokens: usize,
    /// How to choose each token.
    pub sampling: Sampling,
    /// Tokens that end the text. The one that did is not sent.
    pub stop_ids: Vec<u32>,
}

impl Generate {
    /// A channel with room for all events of this request.
    ///
    /// [`mpsc::Sender::try_send`] then never finds it full: there are at most `max_tokens` tokens and
    /// one end. It takes memory only for events that wait.
    pub fn channel(&self) -> (mpsc::Sender<Event>, mpsc::Receiver<Event>) {
        let events_max = self.max_tokens.saturating_add(1);
        mpsc::channel(events_max.min(Semaphore::MAX_PERMITS))
    }
}

/// How to choose a token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// 0 takes the most likely token; more is more even. At most 2.
    pub temperature: f32,
    /// Only the most likely tokens that have this probability together; above 0, at most 1.
    pub top_p: f32,
    /// The same seed gives the same choices.
    pub seed: Option<u64>,
}

/// What an engine sends for a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The next token.
    Token(u32),
    /// Nothing comes after it.
    End(FinishReason),
    /// Nothing comes after it; the text says why.
    Failed(String),
    /// Nothing comes before or after it.
    Refused(Refusal),
}

/// Why a text ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// The model ended it, or a stop string did.
    Stop,
    /// It has as many tokens as it may have.
    Length,
}

/// Why an engine takes no request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// It can never hold the tokens.
    #[error("{tokens} tokens are too long: there is room for {tokens_max}")]
    TooLong {
        /// What the request needs.
        tokens: usize,
        /// What it may need.
        tokens_max: usize,
    },
    /// As many requests wait as may wait.
    #[error("too many requests wait")]
    Busy {
        /// When it makes sense to ask again.
        retry_after: Duration,
    },
    /// It ends, and takes no more.
    #[error("the server is closing")]
    Closing,
    /// It has no such model.
    #[error("there is no such model")]
    UnknownModel,
    /// It sleeps, and others hold the memory that it needs.
    #[error("the model sleeps, and there is no room for the {needed_bytes} bytes that it needs")]
    NoRoom {
        /// What it needs.
        needed_bytes: usize,
        /// When it makes sense to ask again.
        retry_after: Duration,
    },
    /// It has requests, so it does not sleep.
    #[error("the model has requests")]
    Working,
    /// Its models do not sleep.
    #[error("models of this server do not sleep")]
    NeverSleeps,
    /// It could not be put to sleep, and the log says why.
    #[error("the model could not be put to sleep")]
    KeptAwake,
    /// It could not be woken, for another reason than memory, and the log says why.
    #[error("the model could not be woken")]
    KeptAsleep,
}
