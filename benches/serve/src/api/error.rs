//! What goes wrong, and how OpenAI's API says it.

use crate::request::Refusal;
use axum::Json;
use axum::http::{HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use std::time::Duration;

/// Why a request gets no text.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    #[error("The body cannot be read: {0}.")]
    Malformed(String),
    #[error("Invalid value for '{param}': {problem}.")]
    Parameter { param: String, problem: String },
    #[error("The model '{0}' does not exist.")]
    UnknownModel(String),
    #[error("The request needs {tokens} tokens, of which the model can hold {tokens_max}.")]
    TooLong {
        param: &'static str,
        tokens: usize,
        tokens_max: usize,
    },
    #[error("The body is larger than {0} bytes.")]
    TooLarge(usize),
    #[error("There is nothing at '{0}'.")]
    UnknownPath(String),
    #[error("'{1}' does not take {0}.")]
    Method(Method, String),
    #[error("Too many requests wait. Try again later.")]
    Busy { retry_after: Duration },
    #[error("The model '{model}' sleeps, and others hold the {needed_bytes} bytes that it needs.")]
    NoRoom {
        model: String,
        needed_bytes: usize,
        retry_after: Duration,
    },
    #[error("The model '{0}' has requests, so it does not sleep.")]
    Working(String),
    #[error("Models of this server do not sleep. It needs --sleeping or --sleep-after.")]
    NeverSleeps,
    #[error("The server is closing.")]
    Closing,
    #[error("The server failed: {0}.")]
    Failed(String),
}

impl ApiError {
    /// A parameter that is not as it must be.
    pub fn parameter(param: impl Into<String>, problem: impl ToString) -> Self {
        let (param, problem) = (param.into(), problem.to_string());
        Self::Parameter { param, problem }
    }

    /// The server's own fault.
    pub fn failed(problem: impl ToString) -> Self {
        Self::Failed(problem.to_string())
    }

    /// What an engine said of a request for a model, whose prompt is in `param`.
    pub fn refused(refusal: Refusal, model: String, param: &'static str) -> Self {
        match refusal {
            Refusal::TooLong { tokens, tokens_max } => Self::TooLong {
                param,
                tokens,
                tokens_max,
            },
            Refusal::Busy { retry_after } => Self::Busy { retry_after },
            Refusal::Closing => Self::Closing,
            Refusal::UnknownModel => Self::UnknownModel(model),
            Refusal::NoRoom {
                needed_bytes,
                retry_after,
            } => Self::NoRoom {
                model,
                needed_bytes,
                retry_after,
            },
            Refusal::Working => Self::Working(model),
            Refusal::NeverSleeps => Self::NeverSleeps,
            Refusal::KeptAwake | Refusal::KeptAsleep => Self::failed(refusal),
        }
    }

    fn status(&self) -> StatusCode {
        match self {
            Self::Malformed(_) | Self::Parameter { .. } | Self::TooLong { .. } => {
                StatusCode::BAD_REQUEST
            }
            Self::UnknownModel(_) | Self::UnknownPath(_) => StatusCode::NOT_FOUND,
            Self::TooLarge(_) => StatusCode::PAYLOAD_TOO_LARGE,
            Self::Method(..) => StatusCode::METHOD_NOT_ALLOWED,
            Self::Working(_) | Self::NeverSleeps => StatusCode::CONFLICT,
            Self::Busy { .. } | Self::NoRoom { .. } | Self::Closing => {
                StatusCode::SERVICE_UNAVAILABLE
            }
            Self::Failed(_) => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    fn code(&self) -> Option<&'static str> {
        match self {
            Self::Malformed(_) | Self::Failed(_) => None,
            Self::Parameter { .. } => Some("invalid_value"),
            Self::UnknownModel(_) => Some("model_not_found"),
            Self::TooLong { .. } => Some("context_length_exceeded"),
            Self::TooLarge(_) => Some("request_too_large"),
            Self::UnknownPath(_) => Some("unknown_url"),
            Self::Method(..) => Some("method_not_allowed"),
            Self::Busy { .. } => Some("server_busy"),
            Self::NoRoom { .. } => Some("no_room"),
            Self::Working(_) => Some("model_has_requests"),
            Self::NeverSleeps => Some("models_do_not_sleep"),
            Self::Closing => Some("server_closing"),
        }
    }

    fn param(&self) -> Option<&str> {
        match self {
            Self::Parameter { param, .. } => Some(param),
            Self::UnknownModel(_) | Self::NoRoom { .. } | Self::Working(_) => Some("model"),
            Self::TooLong { param, .. } => Some(param),
            _ => None,
        }
    }

    /// The body of the response.
    pub fn json(&self) -> Value {
        let kind = match self.status().is_server_error() {
            true => "server_error",
            false => "invalid_request_error",
        };
        json!({ "error": {
            "message": self.to_string(), "type": kind, "param": self.param(), "code": self.code(),
        }})
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        if let Self::Failed(problem) = &self {
            tracing::error!(problem, "a request failed");
        }
        let mut response = (self.status(), Json(self.json())).into_response();
        if let Self::Busy { retry_after } | Self::NoRoom { retry_after, .. } = self {
            // In whole seconds, and not too early.
            let seconds = retry_after.as_millis().div_ceil(1000).max(1);
            let seconds = HeaderValue::from(u64::try_from(seconds).unwrap_or(u64::MAX));
            response.headers_mut().insert(header::RETRY_AFTER, seconds);
        }
        response
    }
}
