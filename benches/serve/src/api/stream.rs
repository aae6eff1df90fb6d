//! A response in chunks, as server-sent events.

use crate::api::generation::{Generation, Piece};
use crate::api::reply::Reply;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use serde_json::Value;
use std::convert::Infallible;

/// What the last event is.
const DONE: &str = "[DONE]";

struct Chunks {
    reply: Reply,
    generation: Generation,
    stage: Stage,
}

/// What to send next.
enum Stage {
    Opening,
    Pieces,
    Usage,
    Done,
    Over,
}

/// The response. A client that goes away makes the server drop it, and with it the generation.
///
/// A comment goes out now and then if no text does, so that the connection is known to be alive.
pub fn response(reply: Reply, generation: Generation) -> Response {
    let chunks = Chunks {
        reply,
        generation,
        stage: Stage::Opening,
    };
    let events = stream::unfold(chunks, async |mut chunks| {
        let event = Event::default().data(chunks.next().await?);
        Some((Ok::<_, Infallible>(event), chunks))
    });
    let events = Sse::new(events).keep_alive(KeepAlive::default());
    events.into_response()
}

impl Chunks {
    /// The data of the next event.
    async fn next(&mut self) -> Option<String> {
        let (chunk, stage) = match self.stage {
            Stage::Opening => match self.reply.opening() {
                Some(chunk) => (chunk, Stage::Pieces),
                None => self.piece().await,
            },
            Stage::Pieces => self.piece().await,
            Stage::Usage => match self.reply.usage(self.generation.usage()) {
                Some(chunk) => (chunk, Stage::Done),
                None => return self.done(),
            },
            Stage::Done => return self.done(),
            Stage::Over => return None,
        };
        self.stage = stage;
        Some(chunk.to_string())
    }

    fn done(&mut self) -> Option<String> {
        self.stage = Stage::Over;
        Some(DONE.to_owned())
    }

    async fn piece(&mut self) -> (Value, Stage) {
        match self.generation.next().await {
            Ok(Piece::Text(text, ids)) => {
                let ids = ids.unwrap_or_default();
                (self.reply.piece(&text, &ids), Stage::Pieces)
            }
            Ok(Piece::End(reason)) => (self.reply.end(reason), Stage::Usage),
            Err(error) => {
                tracing::error!(%error, "a response failed");
                // The status is long sent; clients look for this.
                (error.json(), Stage::Over)
            }
        }
    }
}
