//! A small HTTP client: what it sends and gets is for a test to see.

use crate::fake::{Server, soon};
use serde_json::Value;
use std::net::SocketAddr;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

pub struct Response {
    pub status: u16,
    head: String,
    pub body: String,
}

impl Response {
    pub fn header(&self, name: &str) -> Option<&str> {
        let lines = self.head.lines().skip(1);
        let mut headers = lines.filter_map(|line| line.split_once(": "));
        let header = headers.find(|header| header.0.eq_ignore_ascii_case(name));
        header.map(|header| header.1)
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).expect(&self.body)
    }

    /// The data of a stream's events, with `[DONE]` as a string.
    pub fn events(&self) -> Vec<Value> {
        assert_eq!(self.status, 200, "{}", self.body);
        assert_eq!(self.header("content-type"), Some("text/event-stream"));
        let events = self.body.split_terminator("\n\n");
        let data = events.filter(|event| !event.starts_with(':')).map(|event| {
            let data = event.strip_prefix("data: ").expect(event);
            match data {
                "[DONE]" => Value::from(data),
                _ => serde_json::from_str(data).expect(data),
            }
        });
        data.collect()
    }
}

/// The bytes of a request. The server closes the connection after its response.
pub fn request(method: &str, path: &str, body: &str) -> Vec<u8> {
    let length = body.len();
    let head = format!("{method} {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n");
    format!("{head}content-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}")
        .into_bytes()
}

/// Sends a request, and leaves the rest to the test. The socket holds little that is not read.
pub async fn open(address: SocketAddr, path: &str, body: &Value) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let mut stream = socket.connect(address).await.unwrap();
    let request = request("POST", path, &body.to_string());
    stream.write_all(&request).await.unwrap();
    stream
}

/// Reads until what came has some text in it.
pub async fn read_until(stream: &mut TcpStream, wanted: &str) -> String {
    let mut got = Vec::new();
    soon(async {
        loop {
            let text = String::from_utf8_lossy(&got);
            if text.contains(wanted) {
                return text.into_owned();
            }
            let count = stream.read_buf(&mut got).await.unwrap();
            assert_ne!(count, 0, "{:?}", String::from_utf8_lossy(&got));
        }
    })
    .await
}

/// Reads a response up to the end of its connection.
pub async fn read(stream: &mut (impl AsyncReadExt + Unpin)) -> Response {
    let mut bytes = Vec::new();
    soon(stream.read_to_end(&mut bytes)).await.unwrap();
    parse(&String::from_utf8(bytes).unwrap())
}

fn parse(text: &str) -> Response {
    let (head, body) = text.split_once("\r\n\r\n").expect(text);
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    let is_chunked = head.contains("transfer-encoding: chunked");
    let body = match is_chunked {
        true => dechunked(body),
        false => body.to_owned(),
    };
    Response {
        status,
        head: head.to_owned(),
        body,
    }
}

fn dechunked(mut body: &str) -> String {
    let mut whole = String::new();
    loop {
        let (length, rest) = body.split_once("\r\n").expect("the length of a chunk");
        let length = usize::from_str_radix(length, 16).unwrap();
        if length == 0 {
            return whole;
        }
        whole += &rest[..length];
        body = rest[length..].strip_prefix("\r\n").expect("a chunk's end");
    }
}

impl Server {
    pub async fn call(&self, method: &str, path: &str, body: &str) -> Response {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        let request = request(method, path, body);
        stream.write_all(&request).await.unwrap();
        read(&mut stream).await
    }

    pub async fn get(&self, path: &str) -> Response {
        self.call("GET", path, "").await
    }

    pub async fn post(&self, path: &str, body: Value) -> Response {
        self.call("POST", path, &body.to_string()).await
    }

    pub async fn complete(&self, body: Value) -> Response {
        self.post("/v1/completions", body).await
    }

    pub async fn chat(&self, body: Value) -> Response {
        self.post("/v1/chat/completions", body).await
    }
}
