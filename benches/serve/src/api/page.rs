//! The page for people.

use axum::response::Html;

/// What a browser gets at `/`.
pub fn page() -> Html<&'static str> {
    Html("<!doctype html><title>cuda-vmm-serve</title><p>The API is below <code>/v1</code>.</p>\n")
}
