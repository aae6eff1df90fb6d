//! Server-sent events, cut into pieces anywhere.

use serde::Deserialize;

/// What the last event of a stream is.
const DONE: &[u8] = b"[DONE]";

/// Puts together the data of events from the pieces in which they come.
#[derive(Debug, Default)]
pub struct Events {
    line: Vec<u8>,
    data: Vec<u8>,
}

impl Events {
    /// Takes in the next bytes, and calls `event` with the data of each event that they end.
    pub fn push(&mut self, bytes: &[u8], mut event: impl FnMut(&[u8])) {
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            self.line.extend_from_slice(piece);
            if !self.line.ends_with(b"\n") {
                return;
            }
            let line = self.line.trim_ascii_end();
            if line.is_empty() && !self.data.is_empty() {
                event(&self.data);
                self.data.clear();
            } else if let Some(data) = line.strip_prefix(b"data:") {
                if !self.data.is_empty() {
                    self.data.push(b'\n');
                }
                self.data.extend_from_slice(data.trim_ascii_start());
            }
            self.line.clear();
        }
    }
}

/// What an event of a completion says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Said {
    /// So many tokens came.
    Tokens(usize),
    /// Nothing comes after it.
    Done,
    /// The server failed, and says why; or the event cannot be read.
    Failed(String),
}

#[derive(Deserialize)]
struct Chunk {
    #[serde(default)]
    choices: Vec<Choice>,
    error: Option<Failure>,
}

#[derive(Deserialize)]
struct Choice {
    #[serde(default)]
    token_ids: Vec<u32>,
}

#[derive(Deserialize)]
struct Failure {
    message: String,
}

impl Said {
    /// Reads the data of an event.
    pub fn read(data: &[u8]) -> Self {
        if data == DONE {
            return Self::Done;
        }
        match serde_json::from_slice::<Chunk>(data) {
            Ok(Chunk {
                error: Some(error), ..
            }) => Self::Failed(error.message),
            Ok(Chunk { choices, .. }) => {
                Self::Tokens(choices.iter().map(|it| it.token_ids.len()).sum())
            }
            Err(error) => Self::Failed(format!("an event cannot be read: {error}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STREAM: &str = ": a comment\n\n\
        data: {\"choices\":[{\"text\":\"\u{e9}\",\"token_ids\":[195,169]}]}\r\n\r\n\
        data: {\"choices\":[]}\n\n\
        data:{\"choices\":\ndata: [{\"token_ids\":[7]}]}\n\n\
        data: {\"error\":{\"message\":\"it fell\",\"code\":null}}\n\n\
        data: {\n\ndata: [DONE]\n\nrest";

    fn said(pieces: &[&[u8]]) -> Vec<Said> {
        let (mut events, mut said) = (Events::default(), Vec::new());
        for piece in pieces {
            events.push(piece, |data| said.push(Said::read(data)));
        }
        said
    }

    #[test]
    fn a_stream_says_the_same_wherever_it_is_cut() {
        let bytes = STREAM.as_bytes();
        let whole = said(&[bytes]);
        let expected = [
            Said::Tokens(2),
            Said::Tokens(0),
            Said::Tokens(1),
            Said::Failed("it fell".to_owned()),
        ];
        assert_eq!(whole[..4], expected);
        assert!(matches!(&whole[4], Said::Failed(why) if why.contains("cannot be read")));
        assert_eq!(whole[5..], [Said::Done]);
        for first in 0..bytes.len() {
            for second in first..bytes.len() {
                let pieces = [&bytes[..first], &bytes[first..second], &bytes[second..]];
                assert_eq!(said(&pieces), whole, "cut at {first} and {second}");
            }
        }
        assert_eq!(said(&bytes.chunks(1).collect::<Vec<_>>()), whole);
    }
}
