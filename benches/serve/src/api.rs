//! OpenAI's HTTP API in front of a [`Backend`].

mod ask;
mod body;
mod completions;
mod error;
mod generation;
mod page;
mod reply;
mod sleep;
mod stream;

use crate::request::Backend;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::{Method, StatusCode, Uri, header};
use axum::response::IntoResponse;
use axum::routing::{get, post};
use axum::serve::ListenerExt;
use axum::{Json, Router};
use error::ApiError;
use futures_util::future::{Either, select};
use page::Page;
use serde_json::{Value, json};
use std::io;
use std::pin::pin;
use std::sync::Arc;
use tokio::net::TcpListener;

/// How large the body of a request may be.
pub const BODY_BYTES_MAX: usize = 4 << 20;

type App = Arc<dyn Backend>;

/// Serves until `shutdown` is ready, and then until the running responses have ended.
///
/// It accepts nothing after `shutdown`. A client that reads nothing keeps its response running, so a
/// caller that waits for a limited time puts a time-out around this and then ends the runtime.
pub async fn serve(
    listener: TcpListener,
    backend: Arc<dyn Backend>,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    // Each token is a small packet that is wanted at once.
    let listener = listener.tap_io(|stream| {
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "no TCP_NODELAY");
        }
    });
    let page = Arc::new(Page::new(backend.clone()));
    let server = axum::serve(listener, router(backend, page.clone()));
    let server = server.with_graceful_shutdown(shutdown).into_future();
    // The first sample is there before the first connection. The last is taken when the server
    // has ended.
    match select(pin!(page.sample()), server).await {
        Either::Left((never, _)) => match never {},
        Either::Right((served, _)) => served,
    }
}

fn router(backend: App, page: Arc<Page>) -> Router {
    let router = Router::new()
        .route("/", get(move || page.clone().respond()))
        .route("/health", get(health))
        .route("/metrics", get(metrics))
        .route("/v1/models", get(models))
        .route("/v1/models/{model}/sleep", post(sleep::sleep))
        .route("/v1/models/{model}/wake", post(sleep::wake))
        .route("/v1/completions", post(completions::complete))
        .route("/v1/chat/completions", post(completions::chat))
        .method_not_allowed_fallback(async |method: Method, uri: Uri| {
            ApiError::Method(method, uri.path().to_owned())
        })
        .fallback(async |uri: Uri| ApiError::UnknownPath(uri.path().to_owned()));
    let router = router.layer(DefaultBodyLimit::max(BODY_BYTES_MAX));
    router.with_state(backend)
}

async fn health(State(backend): State<App>) -> (StatusCode, Json<Value>) {
    let (status, word) = match backend.is_healthy() {
        true => (StatusCode::OK, "ok"),
        false => (StatusCode::SERVICE_UNAVAILABLE, "unhealthy"),
    };
    (status, Json(json!({ "status": word })))
}

async fn metrics(State(backend): State<App>) -> impl IntoResponse {
    let kind = "text/plain; version=0.0.4; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], backend.metrics())
}

async fn models(State(backend): State<App>) -> Json<Value> {
    let models = backend.models().into_iter().map(|model| {
        json!({
            "id": model.id, "object": "model", "created": model.created, "owned_by": "cuda-vmm",
            "state": sleep::state(model.is_asleep),
        })
    });
    Json(json!({ "object": "list", "data": models.collect::<Vec<_>>() }))
}
