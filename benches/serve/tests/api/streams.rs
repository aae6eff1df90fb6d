//! Responses in chunks.

use crate::client::{open, read, read_until};
use crate::fake::{BYTES, Script, Server, soon};
use cuda_vmm_serve::request::{Event, FinishReason};
use serde_json::{Value, json};

/// The events of a stream, whose chunks must have the same head; it is taken out.
fn chunks(mut events: Vec<Value>, object: &str) -> Vec<Value> {
    let first = events[0].clone();
    for event in events.iter_mut().filter(|event| event.is_object()) {
        let head = event.as_object_mut().unwrap();
        for name in ["id", "object", "created", "model"] {
            assert_eq!(head.remove(name).as_ref(), Some(&first[name]), "{name}");
        }
    }
    assert_eq!(
        (&first["object"], &first["model"]),
        (&json!(object), &json!(BYTES))
    );
    events
}

fn text(text: &str, reason: Value) -> Value {
    json!({"choices": [{"index": 0, "text": text, "logprobs": null, "finish_reason": reason}]})
}

fn delta(delta: Value, reason: Value) -> Value {
    json!({"choices": [{"index": 0, "delta": delta, "logprobs": null, "finish_reason": reason}]})
}

#[tokio::test]
async fn a_completion_comes_character_by_character() {
    let server = Server::start(Script::Say("Hé😀")).await;
    let response = server
        .complete(json!({"model": BYTES, "prompt": "Say", "stream": true}))
        .await;
    assert_eq!(response.header("cache-control"), Some("no-cache"));
    let expected = [
        text("H", Value::Null),
        text("é", Value::Null),
        text("😀", Value::Null),
        text("", json!("stop")),
        json!("[DONE]"),
    ];
    assert_eq!(chunks(response.events(), "text_completion"), expected);
}

#[tokio::test]
async fn every_token_has_a_chunk_if_tokens_are_told() {
    let server = Server::start(Script::Say("Hé")).await;
    let body = json!({"model": BYTES, "prompt": "Say", "stream": true, "return_token_ids": true});
    let told = |mut chunk: Value, ids: &[u32]| {
        chunk["choices"][0]["token_ids"] = json!(ids);
        chunk
    };
    let expected = [
        told(text("H", Value::Null), &[72]),
        told(text("", Value::Null), &[0xC3]),
        told(text("é", Value::Null), &[0xA9]),
        told(text("", json!("stop")), &[]),
        json!("[DONE]"),
    ];
    let events = server.complete(body.clone()).await.events();
    assert_eq!(chunks(events, "text_completion"), expected);

    // A stop string that is not whole yet holds text back, but no tokens.
    let mut stopped = body;
    stopped["stop"] = json!("Hé");
    let events = server.complete(stopped).await.events();
    let expected = [
        told(text("", Value::Null), &[72]),
        told(text("", Value::Null), &[0xC3]),
        told(text("", Value::Null), &[0xA9]),
        told(text("", json!("stop")), &[]),
        json!("[DONE]"),
    ];
    assert_eq!(chunks(events, "text_completion"), expected);

    let messages = json!([{"role": "user", "content": "Hi"}]);
    let body = json!({
        "model": BYTES, "messages": messages, "stream": true, "return_token_ids": true,
    });
    let events = server.chat(body).await.events();
    let ids = events.iter().map(|event| &event["choices"][0]["token_ids"]);
    let ids: Vec<_> = ids.take(events.len() - 1).collect();
    let expected = json!([[], [72], [0xC3], [0xA9], []]);
    assert_eq!(json!(ids), expected);
}

#[tokio::test]
async fn a_chat_begins_with_the_role() {
    let server = Server::start(Script::Say("Hello")).await;
    let messages = json!([{"role": "user", "content": "Hi"}]);
    let body = json!({"model": BYTES, "messages": messages, "stream": true, "max_tokens": 2});
    let response = server.chat(body).await;
    let role = json!({"role": "assistant", "content": "", "refusal": null});
    let expected = [
        delta(role, Value::Null),
        delta(json!({"content": "H"}), Value::Null),
        delta(json!({"content": "e"}), Value::Null),
        delta(json!({}), json!("length")),
        json!("[DONE]"),
    ];
    assert_eq!(chunks(response.events(), "chat.completion.chunk"), expected);
}

#[tokio::test]
async fn usage_comes_last_if_it_is_wanted() {
    let server = Server::start(Script::Say("Hi")).await;
    for (path, input) in [
        ("/v1/completions", "prompt"),
        ("/v1/chat/completions", "messages"),
    ] {
        let mut body = json!({
            "model": BYTES, "stream": true, "stream_options": {"include_usage": true},
        });
        body[input] = match input {
            "prompt" => json!("Say"),
            _ => json!([{"role": "user", "content": "Hi"}]),
        };
        let events = server.post(path, body).await.events();
        let (last, before) = events.split_last().unwrap();
        assert_eq!(last, "[DONE]");
        let (usage, before) = before.split_last().unwrap();
        assert_eq!(usage["choices"], json!([]));
        assert_eq!(usage["usage"]["completion_tokens"], 2);
        let total = server.asked().prompt.len() + 2;
        assert_eq!(usage["usage"]["total_tokens"], total);
        for chunk in before {
            assert_eq!(chunk.get("usage"), Some(&Value::Null), "{chunk}");
        }
    }
}

#[tokio::test]
async fn text_comes_as_it_is_generated() {
    let (server, mut senders) = Server::manual().await;
    let body = json!({"model": BYTES, "prompt": "Say", "stream": true, "stop": "bc"});
    let mut stream = open(server.address, "/v1/completions", &body).await;
    let sender = soon(senders.recv()).await.unwrap();
    let send = |byte: u8| sender.try_send(Event::Token(byte.into())).unwrap();
    send(b'a');
    read_until(&mut stream, r#""text":"a""#).await;
    // It may begin the stop string, until the next comes.
    send(b'b');
    send(b'd');
    read_until(&mut stream, r#""text":"bd""#).await;
    send(b'b');
    send(b'c');
    soon(sender.closed()).await;
    let rest = read_until(&mut stream, "[DONE]").await;
    assert!(
        !rest.contains('b') || rest.contains(r#""finish_reason":"stop""#),
        "{rest}"
    );
    assert!(rest.contains(r#""text":"""#), "{rest}");
}

#[tokio::test]
async fn what_was_held_back_comes_at_the_end() {
    let (server, mut senders) = Server::manual().await;
    let body = json!({"model": BYTES, "prompt": "Say", "stream": true, "stop": "b\u{FFFD}c"});
    let mut stream = open(server.address, "/v1/completions", &body).await;
    let sender = soon(senders.recv()).await.unwrap();
    // A possible beginning of the stop string, and one of a character.
    for byte in [b'a', b'b', 0xF0] {
        sender.try_send(Event::Token(byte.into())).unwrap();
    }
    sender.try_send(Event::End(FinishReason::Length)).unwrap();
    let expected = [
        text("a", Value::Null),
        text("b\u{FFFD}", Value::Null),
        text("", json!("length")),
        json!("[DONE]"),
    ];
    let events = read(&mut stream).await.events();
    assert_eq!(chunks(events, "text_completion"), expected);
}

#[tokio::test]
async fn a_failure_is_the_last_event() {
    let server = Server::start(Script::FailAfter("H")).await;
    let options = json!({"include_usage": true});
    let body = json!({"model": BYTES, "prompt": "Say", "stream": true, "stream_options": options});
    let response = server.complete(body).await;
    let expected = json!({"error": {
        "message": "The server failed: a device fell over.", "type": "server_error",
        "param": null, "code": null,
    }});
    let events = response.events();
    assert_eq!(events.len(), 2);
    assert_eq!(events[1], expected);
}
