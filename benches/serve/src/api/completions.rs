//! The endpoints that generate text.

use crate::api::ask::Ask;
use crate::api::body::Body;
use crate::api::error::ApiError;
use crate::api::generation::{Generation, Piece};
use crate::api::reply::{Kind, Reply};
use crate::api::{App, BODY_BYTES_MAX, stream};
use crate::request::{Generate, ModelInfo};
use crate::text::Detokenizer;
use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};

type Content = Result<Bytes, BytesRejection>;

/// `POST /v1/completions`
pub async fn complete(State(backend): State<App>, content: Content) -> Result<Response, ApiError> {
    respond(backend, Kind::Text, content).await
}

/// `POST /v1/chat/completions`
pub async fn chat(State(backend): State<App>, content: Content) -> Result<Response, ApiError> {
    respond(backend, Kind::Chat, content).await
}

async fn respond(backend: App, kind: Kind, content: Content) -> Result<Response, ApiError> {
    let content = content.map_err(unread)?;
    let ask = Ask::of_body(kind, Body::parse(&content)?)?;
    let model = backend.model(&ask.model);
    let model = model.ok_or_else(|| ApiError::UnknownModel(ask.model.clone()))?;
    let is_asleep = model.is_asleep;

    // A long prompt must not hold up the other connections of this thread.
    let prepared = tokio::task::spawn_blocking(|| prepare(ask, model)).await;
    let (ask, generate, detokenizer) = prepared.map_err(ApiError::failed)??;
    let prompt_tokens = generate.prompt.len();
    tracing::debug!(ask.model, prompt_tokens, generate.max_tokens, "a request");

    let events = backend.submit(&ask.model, generate);
    let events =
        events.map_err(|refusal| ApiError::refused(refusal, ask.model.clone(), kind.param()))?;
    let mut generation = Generation::new(
        events,
        detokenizer,
        ask.stop,
        prompt_tokens,
        ask.returns_token_ids,
    );
    // Else the headers of a stream go out at once.
    if is_asleep || !ask.is_streamed {
        let begun = generation.begin().await;
        begun.map_err(|refusal| ApiError::refused(refusal, ask.model.clone(), kind.param()))?;
    }
    let reply = Reply::new(kind, ask.model, ask.include_usage, ask.returns_token_ids);
    match ask.is_streamed {
        true => Ok(stream::response(reply, generation)),
        false => whole(reply, generation).await,
    }
}

fn unread(rejection: BytesRejection) -> ApiError {
    match rejection.status() {
        StatusCode::PAYLOAD_TOO_LARGE => ApiError::TooLarge(BODY_BYTES_MAX),
        _ => ApiError::Malformed(rejection.body_text()),
    }
}

/// What to ask an engine for. There are no more tokens than the model's context has room for.
fn prepare(ask: Ask, model: ModelInfo) -> Result<(Ask, Generate, Detokenizer), ApiError> {
    let prompt = ask.prompt(&model)?;
    let (tokens, tokens_max) = (prompt.len() + 1, model.context_tokens_max);
    if tokens > tokens_max {
        return Err(ApiError::TooLong {
            param: ask.kind.param(),
            tokens,
            tokens_max,
        });
    }
    let detokenizer = Detokenizer::new(model.tokenizer, &prompt).map_err(ApiError::failed)?;
    let generate = Generate {
        max_tokens: ask.max_tokens.min(tokens_max - prompt.len()),
        prompt,
        sampling: ask.sampling,
        stop_ids: match ask.ignores_stop_ids {
            true => Vec::new(),
            false => model.stop_ids,
        },
    };
    Ok((ask, generate, detokenizer))
}

async fn whole(reply: Reply, mut generation: Generation) -> Result<Response, ApiError> {
    let (mut text, mut all_ids) = (String::new(), Vec::new());
    loop {
        match generation.next().await? {
            Piece::Text(piece, ids) => {
                text.push_str(&piece);
                all_ids.extend(ids.unwrap_or_default());
            }
            Piece::End(reason) => {
                let object = reply.whole(&text, &all_ids, reason, generation.usage());
                return Ok(Json(object).into_response());
            }
        }
    }
}
