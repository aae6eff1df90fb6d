//! The endpoints that put a model to sleep, and wake it.

use crate::api::App;
use crate::api::error::ApiError;
use crate::request::{Ended, Refusal};
use axum::Json;
use axum::extract::{Path, State};
use serde_json::{Value, json};

/// `POST /v1/models/NAME/sleep`
pub async fn sleep(
    State(backend): State<App>,
    Path(model): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let ended = backend.sleep(&model);
    respond(model, ended, true).await
}

/// `POST /v1/models/NAME/wake`
pub async fn wake(
    State(backend): State<App>,
    Path(model): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let ended = backend.wake(&model);
    respond(model, ended, false).await
}

/// What a model does.
pub fn state(is_asleep: bool) -> &'static str {
    match is_asleep {
        true => "asleep",
        false => "awake",
    }
}

async fn respond(
    model: String,
    ended: Result<Ended, Refusal>,
    is_asleep: bool,
) -> Result<Json<Value>, ApiError> {
    let ended = match ended {
        Ok(ended) => ended.await.unwrap_or(Err(Refusal::Closing)),
        Err(refusal) => Err(refusal),
    };
    match ended {
        Ok(()) => Ok(Json(
            json!({ "id": model, "object": "model", "state": state(is_asleep) }),
        )),
        Err(refusal) => Err(ApiError::refused(refusal, model, "model")),
    }
}
