//! Each thing that can be wrong with a request.

use crate::client::{Response, read, request};
use crate::fake::{BROKEN, BYTES, SLEEPY, SMALL, STRICT, Script, Server};
use cuda_vmm_serve::api::BODY_BYTES_MAX;
use cuda_vmm_serve::request::Refusal;
use serde_json::{Value, json};
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

const TEXT: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";

#[track_caller]
fn expect(response: &Response, status: u16, param: Option<&str>, code: Option<&str>) {
    let error = response.json();
    let kind = match status {
        500.. => "server_error",
        _ => "invalid_request_error",
    };
    let message = &error["error"]["message"];
    assert!(
        message.as_str().is_some_and(|it| it.ends_with('.')),
        "{error}"
    );
    let expected = json!({"error": {
        "message": message, "type": kind, "param": param, "code": code,
    }});
    assert_eq!((response.status, &error), (status, &expected));
    assert_eq!(response.header("content-type"), Some("application/json"));
}

/// A right request, with one field that is not.
fn with(path: &str, name: &str, value: Value) -> Value {
    let mut body = match path {
        TEXT => json!({"model": BYTES, "prompt": "Say"}),
        _ => json!({"model": BYTES, "messages": [{"role": "user", "content": "Hi"}]}),
    };
    body[name] = value;
    body
}

#[tokio::test]
async fn a_parameter_out_of_its_range_is_named() {
    let server = Server::start(Script::Say("Hello")).await;
    let long = "x".repeat(1025);
    for path in [TEXT, CHAT] {
        for (name, value) in [
            ("model", Value::Null),
            ("model", json!(1)),
            ("n", json!(2)),
            ("n", json!(0)),
            ("n", json!("1")),
            ("max_tokens", json!(0)),
            ("max_tokens", json!(-1)),
            ("max_tokens", json!(1.5)),
            ("max_completion_tokens", json!(0)),
            ("max_completion_tokens", json!("many")),
            ("temperature", json!(-0.1)),
            ("temperature", json!(2.1)),
            ("temperature", json!(1e300)),
            ("temperature", json!("hot")),
            ("top_p", json!(0)),
            ("top_p", json!(1.1)),
            ("top_p", json!([])),
            ("seed", json!(0.5)),
            ("seed", json!(u64::MAX)),
            ("stop", json!("")),
            ("stop", json!(["a", ""])),
            ("stop", json!(["a", "b", "c", "d", "e"])),
            ("stop", json!(long)),
            ("stop", json!(1)),
            ("stream", json!("yes")),
            ("stream_options", json!({"include_usage": true})),
            ("stream_options", json!(true)),
        ] {
            let response = server.post(path, with(path, name, value)).await;
            expect(&response, 400, Some(name), Some("invalid_value"));
        }
    }
    let options = json!({"include_usage": 1});
    let response = server.complete(with(TEXT, "stream_options", options)).await;
    expect(
        &response,
        400,
        Some("stream_options.include_usage"),
        Some("invalid_value"),
    );
}

#[tokio::test]
async fn a_wrong_prompt_is_named() {
    let server = Server::start(Script::Say("Hello")).await;
    for value in [
        Value::Null,
        json!(""),
        json!([]),
        json!([[]]),
        json!(7),
        json!(["a", "b"]),
        json!([[1], [2]]),
        json!([1, "a"]),
        json!([257]),
        json!([-1]),
    ] {
        let response = server.complete(with(TEXT, "prompt", value)).await;
        expect(&response, 400, Some("prompt"), Some("invalid_value"));
    }
}

#[tokio::test]
async fn a_wrong_message_is_named() {
    let server = Server::start(Script::Say("Hello")).await;
    let image = json!([{"type": "image_url", "image_url": {"url": "data:"}}]);
    for (param, value) in [
        ("messages", Value::Null),
        ("messages", json!([])),
        ("messages", json!("Hi")),
        ("messages[0]", json!(["Hi"])),
        ("messages[0]", json!([{"content": "Hi"}])),
        (
            "messages[0].role",
            json!([{"role": "king", "content": "Hi"}]),
        ),
        (
            "messages[0].content",
            json!([{"role": "user", "content": null}]),
        ),
        (
            "messages[0].content",
            json!([{"role": "user", "content": image}]),
        ),
    ] {
        let response = server.chat(with(CHAT, "messages", value)).await;
        expect(&response, 400, Some(param), Some("invalid_value"));
    }
    let refused = server.chat(with(CHAT, "model", json!(STRICT))).await;
    expect(&refused, 400, Some("messages"), Some("invalid_value"));
    assert!(refused.body.contains("No chats."), "{}", refused.body);
    let broken = server.chat(with(CHAT, "model", json!(BROKEN))).await;
    expect(&broken, 500, None, None);
}

#[tokio::test]
async fn what_is_no_json_is_malformed() {
    let server = Server::start(Script::Say("Hello")).await;
    let deep = "[".repeat(100_000);
    for body in [
        "",
        "{",
        "[]",
        "1",
        "{} {}",
        r#"{"model": "bytes",}"#,
        "{\"model\": \"\u{1}\"}",
        &deep,
    ] {
        let response = server.call("POST", TEXT, body).await;
        expect(&response, 400, None, None);
    }
    let deep = format!(r#"{{"model": "bytes", "prompt": "a", "other": {deep}"#);
    let response = server.call("POST", TEXT, &deep).await;
    expect(&response, 400, None, None);
}

#[tokio::test]
async fn an_unknown_model_is_not_found() {
    let server = Server::start(Script::Say("Hello")).await;
    for path in [TEXT, CHAT] {
        let response = server.post(path, with(path, "model", json!("none"))).await;
        expect(&response, 404, Some("model"), Some("model_not_found"));
    }
    let server = Server::start(Script::Refuse(Refusal::UnknownModel)).await;
    let response = server.complete(with(TEXT, "n", json!(1))).await;
    expect(&response, 404, Some("model"), Some("model_not_found"));
}

#[tokio::test]
async fn a_prompt_that_leaves_no_room_is_too_long() {
    let server = Server::start(Script::Say("Hello")).await;
    let mut body = with(TEXT, "model", json!(SMALL));
    body["prompt"] = json!("12345678");
    let response = server.complete(body).await;
    expect(
        &response,
        400,
        Some("prompt"),
        Some("context_length_exceeded"),
    );
    let response = server.chat(with(CHAT, "model", json!(SMALL))).await;
    expect(
        &response,
        400,
        Some("messages"),
        Some("context_length_exceeded"),
    );

    let refusal = Refusal::TooLong {
        tokens: 19,
        tokens_max: 10,
    };
    let server = Server::start(Script::Refuse(refusal)).await;
    let response = server.complete(with(TEXT, "n", json!(1))).await;
    expect(
        &response,
        400,
        Some("prompt"),
        Some("context_length_exceeded"),
    );
    assert!(response.body.contains("19 tokens"), "{}", response.body);
}

#[tokio::test]
async fn a_busy_server_says_when_to_come_back() {
    for (wait, seconds) in [(0, "1"), (1000, "1"), (1001, "2")] {
        let retry_after = Duration::from_millis(wait);
        let server = Server::start(Script::Refuse(Refusal::Busy { retry_after })).await;
        let response = server.chat(with(CHAT, "stream", json!(true))).await;
        expect(&response, 503, None, Some("server_busy"));
        assert_eq!(response.header("retry-after"), Some(seconds));
    }
    let server = Server::start(Script::Refuse(Refusal::Closing)).await;
    let response = server.complete(with(TEXT, "n", json!(1))).await;
    expect(&response, 503, None, Some("server_closing"));
    assert_eq!(response.header("retry-after"), None);
}

#[tokio::test]
async fn a_failure_of_the_engine_is_the_servers() {
    let server = Server::start(Script::FailAfter("H")).await;
    let response = server.complete(with(TEXT, "n", json!(1))).await;
    expect(&response, 500, None, None);
    assert!(
        response.body.contains("a device fell over"),
        "{}",
        response.body
    );
    let server = Server::start(Script::DropAfter("H")).await;
    let response = server.chat(with(CHAT, "n", json!(1))).await;
    expect(&response, 500, None, None);
}

#[tokio::test]
async fn paths_and_methods_are_checked() {
    let server = Server::start(Script::Say("Hello")).await;
    for path in ["/v1", "/v1/models/", "/v2/completions", "/favicon.ico"] {
        let response = server.get(path).await;
        expect(&response, 404, None, Some("unknown_url"));
    }
    for (method, path, allowed) in [
        ("GET", TEXT, "POST"),
        ("PUT", CHAT, "POST"),
        ("POST", "/v1/models", "GET,HEAD"),
        ("DELETE", "/health", "GET,HEAD"),
        ("POST", "/metrics", "GET,HEAD"),
        ("POST", "/", "GET,HEAD"),
    ] {
        let response = server.call(method, path, "{}").await;
        expect(&response, 405, None, Some("method_not_allowed"));
        assert_eq!(response.header("allow"), Some(allowed), "{path}");
    }
}

#[tokio::test]
async fn a_body_that_is_too_large_is_refused() {
    let server = Server::start(Script::Say("Hello")).await;
    for excess in [0, 1] {
        let mut body = with(TEXT, "user", json!(""));
        let filling = BODY_BYTES_MAX + excess - body.to_string().len();
        body["user"] = "x".repeat(filling).into();
        let body = body.to_string();
        assert_eq!(body.len(), BODY_BYTES_MAX + excess);
        let response = server.call("POST", TEXT, &body).await;
        match excess {
            0 => assert_eq!(response.status, 200, "{}", response.body),
            _ => expect(&response, 413, None, Some("request_too_large")),
        }
    }
}

/// Its length is not known before.
#[tokio::test]
async fn a_chunked_body_that_is_too_large_is_refused() {
    let server = Server::start(Script::Say("Hello")).await;
    let stream = TcpStream::connect(server.address).await.unwrap();
    let (mut from, mut to) = stream.into_split();
    let head = "POST /v1/completions HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\
        transfer-encoding: chunked\r\n\r\n";
    to.write_all(head.as_bytes()).await.unwrap();
    let chunk = format!("10000\r\n{}\r\n", "x".repeat(0x10000));
    for _ in 0..=BODY_BYTES_MAX / 0x10000 {
        // The server may close before it has all.
        if to.write_all(chunk.as_bytes()).await.is_err() {
            break;
        }
    }
    expect(&read(&mut from).await, 413, None, Some("request_too_large"));
}

#[tokio::test]
async fn a_client_that_ends_within_its_body_gets_no_text() {
    let server = Server::start(Script::Say("Hello")).await;
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    let mut request = request("POST", TEXT, &with(TEXT, "n", json!(1)).to_string());
    request.pop();
    stream.write_all(&request).await.unwrap();
    stream.shutdown().await.unwrap();
    let response = read(&mut stream).await;
    expect(&response, 400, None, None);
}

const NO_ROOM: Refusal = Refusal::NoRoom {
    needed_bytes: 1234,
    retry_after: Duration::from_millis(1001),
};

#[tokio::test]
async fn a_model_that_sleeps_and_gets_no_room_says_when_to_come_back() {
    let server = Server::start(Script::RefuseLater(NO_ROOM)).await;
    for path in [TEXT, CHAT] {
        for is_streamed in [false, true] {
            let mut body = with(path, "stream", json!(is_streamed));
            body["model"] = json!(SLEEPY);
            let response = server.post(path, body).await;
            expect(&response, 503, Some("model"), Some("no_room"));
            assert_eq!(response.header("retry-after"), Some("2"));
            assert!(response.body.contains("1234 bytes"), "{}", response.body);
        }
    }
    let server = Server::start(Script::Say("Hello")).await;
    let mut body = with(TEXT, "stream", json!(true));
    body["model"] = json!(SLEEPY);
    let events = server.post(TEXT, body).await.events();
    assert_eq!(events[0]["choices"][0]["text"], "H", "nothing is lost");
}

#[tokio::test]
async fn sleep_and_wake_say_what_a_model_does_or_why_not() {
    let path = |model: &str, what: &str| format!("/v1/models/{model}/{what}");
    for (what, state) in [("sleep", "asleep"), ("wake", "awake")] {
        let server = Server::start(Script::Say("")).await;
        let response = server.post(&path(BYTES, what), json!({})).await;
        let expected = json!({ "id": BYTES, "object": "model", "state": state });
        assert_eq!((response.status, response.json()), (200, expected));
        let response = server.post(&path("none", what), json!({})).await;
        expect(&response, 404, Some("model"), Some("model_not_found"));
        let response = server.get(&path(BYTES, what)).await;
        assert_eq!(response.status, 405);
        for (refusal, status, param, code) in [
            (NO_ROOM, 503, Some("model"), Some("no_room")),
            (
                Refusal::Working,
                409,
                Some("model"),
                Some("model_has_requests"),
            ),
            (Refusal::NeverSleeps, 409, None, Some("models_do_not_sleep")),
            (Refusal::KeptAwake, 500, None, None),
            (Refusal::Closing, 503, None, Some("server_closing")),
        ] {
            for script in [Script::Refuse(refusal), Script::RefuseLater(refusal)] {
                let server = Server::start(script).await;
                let response = server.post(&path(BYTES, what), json!({})).await;
                expect(&response, status, param, code);
            }
        }
        // The model has ended.
        let server = Server::start(Script::DropAfter("")).await;
        let response = server.post(&path(BYTES, what), json!({})).await;
        expect(&response, 503, None, Some("server_closing"));
    }
}
