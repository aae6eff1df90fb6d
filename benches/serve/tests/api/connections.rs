//! Clients that go away or read slowly, and a server that ends.

use crate::client::{open, read, read_until, request};
use crate::fake::{BYTES, PATIENCE, Script, Server, soon};
use cuda_vmm_serve::request::{Event, FinishReason};
use serde_json::{Value, json};
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

fn body(is_streamed: bool) -> Value {
    json!({"model": BYTES, "prompt": "Say", "stream": is_streamed, "max_tokens": 60_000})
}

#[tokio::test]
async fn a_client_that_goes_away_ends_its_generation() {
    let (server, mut senders) = Server::manual().await;
    for is_streamed in [true, false] {
        let stream = open(server.address, "/v1/completions", &body(is_streamed)).await;
        let sender = soon(senders.recv()).await.unwrap();
        sender.try_send(Event::Token(97)).unwrap();
        let is_closed = timeout(Duration::from_millis(50), sender.closed()).await;
        assert!(is_closed.is_err(), "it is still wanted");
        drop(stream);
        // Without one more token.
        soon(sender.closed()).await;
    }
}

#[tokio::test]
async fn a_client_that_goes_away_within_a_stream_ends_its_generation() {
    let (server, mut senders) = Server::manual().await;
    let mut stream = open(server.address, "/v1/completions", &body(true)).await;
    let sender = soon(senders.recv()).await.unwrap();
    sender.try_send(Event::Token(97)).unwrap();
    read_until(&mut stream, r#""text":"a""#).await;
    drop(stream);
    soon(sender.closed()).await;
}

#[tokio::test]
async fn a_slow_reader_holds_up_nobody() {
    let (server, mut senders) = Server::manual().await;
    let mut slow = open(server.address, "/v1/completions", &body(true)).await;
    let sender = soon(senders.recv()).await.unwrap();
    // More than sockets hold; the engine never waits.
    for _ in 0..60_000 {
        sender.try_send(Event::Token(97)).unwrap();
    }
    sender.try_send(Event::End(FinishReason::Length)).unwrap();
    sleep(Duration::from_millis(300)).await;
    assert!(sender.capacity() < 60_000, "events wait for the reader");

    assert_eq!(server.get("/health").await.status, 200);
    let mut other = open(server.address, "/v1/completions", &body(false)).await;
    let sender = soon(senders.recv()).await.unwrap();
    sender.try_send(Event::Token(98)).unwrap();
    sender.try_send(Event::End(FinishReason::Stop)).unwrap();
    let response = read(&mut other).await.json();
    assert_eq!(response["choices"][0]["text"], "b");

    let events = read(&mut slow).await.events();
    assert_eq!(events.len(), 60_002);
    assert_eq!(events.last().unwrap(), "[DONE]");
}

#[tokio::test]
async fn a_connection_takes_requests_after_each_other() {
    let server = Server::start(Script::Say("Hi")).await;
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    for is_streamed in [true, false, true] {
        let bytes = request("POST", "/v1/completions", &body(is_streamed).to_string());
        let bytes = String::from_utf8(bytes).unwrap();
        let bytes = bytes.replace("connection: close\r\n", "");
        stream.write_all(bytes.as_bytes()).await.unwrap();
        let end = if is_streamed {
            "\r\n0\r\n\r\n"
        } else {
            "usage"
        };
        let response = read_until(&mut stream, end).await;
        assert!(response.starts_with("HTTP/1.1 200 OK\r\n"), "{response}");
    }
}

#[tokio::test]
async fn a_shutdown_waits_for_what_runs() {
    let (server, mut senders) = Server::manual().await;
    let mut running = open(server.address, "/v1/completions", &body(true)).await;
    let sender = soon(senders.recv()).await.unwrap();
    sender.try_send(Event::Token(97)).unwrap();
    read_until(&mut running, r#""text":"a""#).await;
    // A connection without a request waits for nothing.
    let idle = TcpStream::connect(server.address).await.unwrap();
    sleep(Duration::from_millis(50)).await;

    server.shutdown.send(()).unwrap();
    soon(async {
        while TcpStream::connect(server.address).await.is_ok() {
            sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    assert!(!server.served.is_finished(), "a response runs");
    sender.try_send(Event::Token(98)).unwrap();
    read_until(&mut running, r#""text":"b""#).await;
    sender.try_send(Event::End(FinishReason::Stop)).unwrap();
    read_until(&mut running, "[DONE]").await;
    let served = timeout(PATIENCE, server.served).await;
    served.expect("it ends").unwrap().unwrap();
    drop(idle);
}
