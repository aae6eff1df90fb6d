//! Responses in one piece.

use crate::fake::{BROKEN, BYTES, SMALL, STRICT, Script, Server, soon};
use cuda_vmm_serve::request::{Event, Sampling};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::{Duration, Instant};

fn ids(text: &str) -> Vec<u32> {
    text.bytes().map(u32::from).collect()
}

#[tokio::test]
async fn the_models_are_listed() {
    let server = Server::start(Script::Say("")).await;
    let response = server.get("/v1/models").await;
    assert_eq!(response.status, 200);
    let list = response.json();
    assert_eq!(list["object"], "list");
    assert_eq!(list["data"].as_array().unwrap().len(), 5);
    let expected = json!({
        "id": BYTES, "object": "model", "created": 1_700_000_000, "owned_by": "cuda-vmm",
        "state": "awake",
    });
    assert_eq!(list["data"][0], expected);
    assert_eq!(list["data"][4]["state"], "asleep");
}

#[tokio::test]
async fn health_and_metrics_are_there() {
    let server = Server::start(Script::Say("")).await;
    let health = server.get("/health").await;
    assert_eq!(
        (health.status, health.json()),
        (200, json!({"status": "ok"}))
    );
    let metrics = server.get("/metrics").await;
    assert_eq!(
        (metrics.status, &*metrics.body),
        (200, "requests_total 1\n")
    );
    let kind = metrics.header("content-type").unwrap();
    assert!(kind.starts_with("text/plain; version=0.0.4"), "{kind}");
    let server = Server::start_with(Script::Say(""), false).await;
    let health = server.get("/health").await;
    assert_eq!(
        (health.status, health.json()),
        (503, json!({"status": "unhealthy"}))
    );
}

#[tokio::test]
async fn the_page_has_the_models_and_is_not_kept() {
    let server = Server::start(Script::Say("")).await;
    let page = server.get("/").await;
    assert_eq!(page.status, 200, "{}", page.body);
    let kind = page.header("content-type");
    assert_eq!(kind, Some("text/html; charset=utf-8"));
    assert_eq!(page.header("cache-control"), Some("no-store"));
    let security = page.header("content-security-policy").unwrap();
    assert!(security.starts_with("default-src 'none';"), "{security}");
    for model in [BYTES, SMALL, STRICT, BROKEN] {
        assert!(page.body.contains(&format!(">{model}</th>")), "{model}");
    }
    // There is a first sample before there is a connection.
    assert!(page.body.contains("<polygon"), "{}", page.body);
}

#[tokio::test]
async fn the_page_is_drawn_once_for_all_who_ask_within_two_seconds() {
    soon(async {
        loop {
            let server = Server::start(Script::Say("")).await;
            let begin = Instant::now();
            let pages = [server.get("/").await.body, server.get("/").await.body];
            if begin.elapsed() < Duration::from_secs(2) {
                assert_eq!(pages[0], pages[1]);
                // The figures have changed, and so does the page.
                while server.get("/").await.body == pages[0] {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
                return;
            }
        }
    })
    .await;
}

#[tokio::test]
async fn the_sampler_takes_figures_until_the_server_ends() {
    let server = Server::start(Script::Say("")).await;
    soon(async {
        while server.fake.figures_taken() < 3 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    server.shutdown.send(()).unwrap();
    soon(server.served).await.unwrap().unwrap();
    // Nothing holds the engine any longer.
    assert_eq!(Arc::strong_count(&server.fake), 1);
}

#[tokio::test]
async fn a_completion_has_the_fields_of_openai() {
    let server = Server::start(Script::Say("Héllo")).await;
    let response = server
        .complete(json!({"model": BYTES, "prompt": "Say"}))
        .await;
    assert_eq!(response.status, 200);
    assert_eq!(response.header("content-type"), Some("application/json"));
    let mut object = response.json();
    let id = object["id"].take();
    assert!(id.as_str().unwrap().starts_with("cmpl-"), "{id}");
    assert!(object["created"].take().as_u64().unwrap() > 1_700_000_000);
    let expected = json!({
        "id": null, "object": "text_completion", "created": null, "model": BYTES,
        "choices": [{"text": "Héllo", "index": 0, "logprobs": null, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 6, "total_tokens": 9},
    });
    assert_eq!(object, expected);
    let asked = server.asked();
    let sampling = Sampling {
        temperature: 1.0,
        top_p: 1.0,
        seed: None,
    };
    assert_eq!((asked.prompt, asked.max_tokens), (ids("Say"), 16));
    assert_eq!((asked.sampling, asked.stop_ids), (sampling, vec![256]));

    let again = server
        .complete(json!({"model": BYTES, "prompt": "Say"}))
        .await;
    assert_ne!(again.json()["id"], id);
}

#[tokio::test]
async fn a_chat_has_the_fields_of_openai() {
    let server = Server::start(Script::Say("Hello")).await;
    let messages = json!([
        {"role": "developer", "content": "Be.", "name": "someone"},
        {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]},
    ]);
    let response = server
        .chat(json!({"model": BYTES, "messages": messages}))
        .await;
    assert_eq!(response.status, 200, "{}", response.body);
    let mut object = response.json();
    let id = object["id"].take();
    assert!(id.as_str().unwrap().starts_with("chatcmpl-"), "{id}");
    object["created"].take();
    let message = json!({"role": "assistant", "content": "Hello", "refusal": null});
    let expected = json!({
        "id": null, "object": "chat.completion", "created": null, "model": BYTES,
        "choices": [{"index": 0, "message": message, "logprobs": null, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 31, "completion_tokens": 5, "total_tokens": 36},
    });
    assert_eq!(object, expected);
    let asked = server.asked();
    assert_eq!(asked.prompt, ids("system: Be.\nuser: Hi\nassistant:"));
    // As many as the context has room for.
    assert_eq!(asked.max_tokens, 1_000_000 - 31);
}

#[tokio::test]
async fn the_parameters_reach_the_engine() {
    let server = Server::start(Script::Say("Hello")).await;
    let mut body = json!({
        "model": BYTES, "prompt": "Say", "max_tokens": 3, "temperature": 0, "top_p": 0.5,
        "seed": -1, "n": 1, "stream": false, "stop": [], "user": "me", "frequency_penalty": 0,
    });
    let response = server.complete(body.clone()).await.json();
    assert_eq!(response["choices"][0]["text"], "Hel");
    assert_eq!(response["choices"][0]["finish_reason"], "length");
    let asked = server.asked();
    let sampling = Sampling {
        temperature: 0.0,
        top_p: 0.5,
        seed: Some(u64::MAX),
    };
    assert_eq!((asked.sampling, asked.max_tokens), (sampling, 3));

    body["max_completion_tokens"] = json!(2);
    assert_eq!(server.complete(body).await.status, 200);
    assert_eq!(server.asked().max_tokens, 2);
    let nothing = json!({
        "model": BYTES, "prompt": "Say", "max_tokens": null, "temperature": null, "top_p": null,
        "seed": null, "n": null, "stream": null, "stop": null, "stream_options": null,
    });
    assert_eq!(server.complete(nothing).await.status, 200);
    assert_eq!(server.asked().max_tokens, 16);
}

#[tokio::test]
async fn a_prompt_comes_in_four_forms() {
    let server = Server::start(Script::Say("")).await;
    let forms = [
        json!("Say"),
        json!(["Say"]),
        json!([83, 97, 121]),
        json!([[83, 97, 121]]),
    ];
    for form in forms {
        let response = server
            .complete(json!({"model": BYTES, "prompt": form}))
            .await;
        assert_eq!(response.status, 200, "{}", response.body);
        assert_eq!(server.asked().prompt, ids("Say"));
        assert_eq!(response.json()["choices"][0]["text"], "");
    }
}

#[tokio::test]
async fn the_context_limits_the_tokens() {
    let server = Server::start(Script::Say("Hello")).await;
    let response = server
        .complete(json!({"model": SMALL, "prompt": "1234567"}))
        .await;
    assert_eq!(server.asked().max_tokens, 1);
    assert_eq!(response.json()["choices"][0]["text"], "H");
}

#[tokio::test]
async fn a_character_that_is_cut_off_is_replaced() {
    let server = Server::start(Script::Say("é")).await;
    let body = json!({"model": BYTES, "prompt": "Say", "max_tokens": 1});
    let response = server.complete(body).await.json();
    assert_eq!(response["choices"][0]["text"], "\u{FFFD}");
}

async fn stopped(stop: Value) -> Value {
    let server = Server::start(Script::Say("one STOP two")).await;
    let body = json!({"model": BYTES, "prompt": "Say", "stop": stop});
    server.complete(body).await.json()
}

#[tokio::test]
async fn a_stop_string_over_tokens_ends_the_text() {
    for stop in [json!("STOP"), json!(["nowhere", "two", "STOP"])] {
        let response = stopped(stop).await;
        let choice = &response["choices"][0];
        assert_eq!(
            (&choice["text"], &choice["finish_reason"]),
            (&json!("one "), &json!("stop"))
        );
        // The tokens of the string count, and no more.
        assert_eq!(response["usage"]["completion_tokens"], 8);
    }
    // What could begin it at the end is text.
    let response = stopped(json!("two more")).await;
    assert_eq!(response["choices"][0]["text"], "one STOP two");
}

#[tokio::test]
async fn the_engine_learns_of_a_stop_string() {
    let (server, mut senders) = Server::manual().await;
    let body = json!({"model": BYTES, "prompt": "Say", "stop": "b"});
    let (response, ()) = tokio::join!(server.complete(body), async {
        let sender = soon(senders.recv()).await.unwrap();
        for byte in *b"ab" {
            sender.try_send(Event::Token(byte.into())).unwrap();
        }
        soon(sender.closed()).await;
    });
    assert_eq!(response.json()["choices"][0]["text"], "a");
}

#[tokio::test]
async fn tokens_are_told_and_none_ends_the_text_if_that_is_asked() {
    let server = Server::start(Script::Say("Hé")).await;
    let mut body = json!({"model": BYTES, "prompt": "Say", "return_token_ids": true});
    let choice = server.complete(body.clone()).await.json()["choices"][0].clone();
    assert_eq!(choice["text"], "Hé");
    assert_eq!(choice["token_ids"], json!(ids("Hé")));
    assert_eq!(server.asked().stop_ids, [256]);
    body["ignore_eos"] = json!(true);
    body["return_token_ids"] = Value::Null;
    let choice = server.complete(body.clone()).await.json()["choices"][0].clone();
    assert_eq!(choice.get("token_ids"), None);
    assert_eq!(server.asked().stop_ids, [0; 0]);
    body["ignore_eos"] = json!("yes");
    let response = server.complete(body).await;
    assert_eq!(response.status, 400);
    assert_eq!(response.json()["error"]["param"], "ignore_eos");
}
