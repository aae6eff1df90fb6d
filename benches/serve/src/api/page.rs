//! The page for people: memory, requests and tokens of the last minutes, as HTML with SVG.
//!
//! A sampler takes the figures while the server runs. The page is made from them when a browser
//! asks, on a thread that serves no connection, and once for all browsers that ask within
//! [`REFRESH`]. With optimization that takes 1 to 3 ms for two models, and 1 to 9 ms for eight, beside
//! models that run on the same cores. A page has at most about 50 KB for two models and 160 KB for
//! eight, and far less if little changes.

mod chart;
mod history;
mod html;
mod points;

use super::error::ApiError;
use crate::request::Backend;
use axum::body::Bytes;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use history::History;
use std::convert::Infallible;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::time::sleep;

/// How long the sampler waits after it has taken the figures.
const SAMPLED: Duration = Duration::from_millis(500);
/// How often browsers ask again.
const REFRESH: Duration = Duration::from_secs(2);

/// A page runs nothing, and loads nothing.
const SECURITY: &str = "default-src 'none'; style-src 'unsafe-inline'; img-src data:";

/// A page that was made, and when.
type Made = Option<(Instant, Bytes)>;

/// The page of a backend.
pub struct Page {
    backend: Arc<dyn Backend>,
    began: Instant,
    history: Mutex<History>,
    /// The thread that makes the page keeps it locked meanwhile.
    made: Arc<tokio::sync::Mutex<Made>>,
}

impl Page {
    /// The page of a backend, with no figures yet.
    pub fn new(backend: Arc<dyn Backend>) -> Self {
        Self {
            backend,
            began: Instant::now(),
            history: Mutex::default(),
            made: Arc::default(),
        }
    }

    /// Takes the figures at once, and again and again until the future is dropped.
    pub async fn sample(&self) -> Infallible {
        loop {
            self.take();
            sleep(SAMPLED).await;
        }
    }

    fn take(&self) {
        let figures = self.backend.figures();
        let mut history = self.history.lock().unwrap_or_else(PoisonError::into_inner);
        history.push(self.began.elapsed(), figures);
    }

    /// The response to a browser.
    ///
    /// # Errors
    ///
    /// [`ApiError::Failed`] if it cannot be drawn.
    pub async fn respond(self: Arc<Self>) -> Result<Response, ApiError> {
        let mut made = self.made.clone().lock_owned().await;
        let text = match &*made {
            Some((at, text)) if at.elapsed() < REFRESH => text.clone(),
            _ => {
                // The lock goes along, so that nobody else draws if this browser goes away.
                let draw = move || {
                    let text = Bytes::from(self.draw()?);
                    *made = Some((Instant::now(), text.clone()));
                    Ok::<_, ApiError>(text)
                };
                let drawn = tokio::task::spawn_blocking(draw).await;
                drawn.map_err(ApiError::failed)??
            }
        };
        let headers = [
            (header::CONTENT_TYPE, "text/html; charset=utf-8"),
            (header::CACHE_CONTROL, "no-store"),
            (header::CONTENT_SECURITY_POLICY, SECURITY),
        ];
        Ok((headers, text).into_response())
    }

    fn draw(&self) -> Result<String, ApiError> {
        let now = self.backend.figures();
        let history = self.history.lock().unwrap_or_else(PoisonError::into_inner);
        let points = points::points(&history);
        drop(history);
        html::page(&now, &points, REFRESH).map_err(ApiError::failed)
    }
}
