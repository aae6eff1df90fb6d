//! The text of a response, as it is generated.

use crate::api::error::ApiError;
use crate::request::{Event, FinishReason, Refusal};
use crate::text::{Detokenizer, StopStrings, TokenizerError};
use tokio::sync::mpsc;

/// Makes text of an engine's events. When it is dropped, the engine learns that no more is wanted.
#[derive(Debug)]
pub struct Generation {
    /// None once nothing more is wanted of it.
    events: Option<mpsc::Receiver<Event>>,
    /// An event that has been waited for.
    first: Option<Event>,
    detokenizer: Detokenizer,
    stops: StopStrings,
    end: Option<FinishReason>,
    usage: Usage,
    /// Tokens that were not given yet, if they are to be given.
    ids: Option<Vec<u32>>,
}

/// The tokens of a request.
#[derive(Clone, Copy, Debug)]
pub struct Usage {
    pub prompt: usize,
    pub completion: usize,
}

/// What comes next.
#[derive(Debug, PartialEq, Eq)]
pub enum Piece {
    /// Text, and the tokens that it came with if they are to be given. One of them is not empty.
    Text(String, Option<Vec<u32>>),
    /// There is no more.
    End(FinishReason),
}

impl Generation {
    /// The text that comes after a prompt, up to the first of some strings.
    ///
    /// If tokens are to be given, there is a piece for each, even if it makes no text yet.
    pub fn new(
        events: mpsc::Receiver<Event>,
        detokenizer: Detokenizer,
        stop: Vec<String>,
        prompt_tokens: usize,
        gives_tokens: bool,
    ) -> Self {
        Self {
            events: Some(events),
            first: None,
            detokenizer,
            stops: StopStrings::new(stop),
            end: None,
            usage: Usage {
                prompt: prompt_tokens,
                completion: 0,
            },
            ids: gives_tokens.then(Vec::new),
        }
    }

    /// The tokens so far.
    pub fn usage(&self) -> Usage {
        self.usage
    }

    /// Waits until something comes. For a model that sleeps: whether there is room for it is known
    /// then, and the response can still say so.
    ///
    /// # Errors
    ///
    /// The refusal, if it is one.
    pub async fn begin(&mut self) -> Result<(), Refusal> {
        if let Some(events) = &mut self.events {
            self.first = events.recv().await;
        }
        match self.first {
            Some(Event::Refused(refusal)) => Err(refusal),
            _ => Ok(()),
        }
    }

    /// Waits for what comes next.
    pub async fn next(&mut self) -> Result<Piece, ApiError> {
        loop {
            if let Some(reason) = self.end {
                return Ok(Piece::End(reason));
            }
            let event = match (self.first.take(), &mut self.events) {
                (Some(event), _) => Some(event),
                (None, Some(events)) => events.recv().await,
                (None, None) => None,
            };
            let text = match event {
                Some(Event::Refused(refusal)) => return Err(ApiError::failed(refusal)),
                Some(Event::Failed(problem)) => return Err(ApiError::Failed(problem)),
                None => return Err(ApiError::failed("the engine gave the request up")),
                Some(event) => self.text(event).map_err(ApiError::failed)?,
            };
            if self.stops.is_found() {
                self.end = Some(FinishReason::Stop);
            }
            if self.end.is_some() {
                self.events = None;
            }
            let has_ids = self.ids.as_ref().is_some_and(|ids| !ids.is_empty());
            if has_ids || !text.is_empty() {
                let ids = self.ids.as_mut().map(std::mem::take);
                return Ok(Piece::Text(text, ids));
            }
        }
    }

    /// The text that comes with an event.
    fn text(&mut self, event: Event) -> Result<String, TokenizerError> {
        match event {
            Event::Token(id) => {
                self.usage.completion += 1;
                if let Some(ids) = &mut self.ids {
                    ids.push(id);
                }
                let text = self.detokenizer.push(id)?;
                Ok(self.stops.push(&text))
            }
            Event::End(reason) => {
                self.end = Some(reason);
                let rest = self.detokenizer.finish()?;
                Ok(self.stops.push(&rest) + &self.stops.finish())
            }
            Event::Failed(_) | Event::Refused(_) => Ok(String::new()),
        }
    }
}
