//! Text into tokens, and tokens into text.

use std::fmt;

/// The token that ends a text if bytes are the tokens.
pub const BYTES_END_OF_TEXT: u32 = 256;

/// Turns text into the tokens of a model, and back.
pub struct Tokenizer(Kind);

enum Kind {
    /// As a `tokenizer.json` of Hugging Face says.
    File(Box<tokenizers::Tokenizer>),
    /// Each byte is the token of its number.
    Bytes,
}

/// A `tokenizer.json` cannot be read, or does not fit its text.
#[derive(Debug, thiserror::Error)]
#[error("the tokenizer: {0}")]
pub struct TokenizerError(#[source] tokenizers::Error);

impl Tokenizer {
    /// Each byte of the text is a token; [`BYTES_END_OF_TEXT`] is the one token more.
    pub fn bytes() -> Self {
        Self(Kind::Bytes)
    }

    /// The tokenizer that the content of a `tokenizer.json` describes.
    pub fn from_json(json: &[u8]) -> Result<Self, TokenizerError> {
        let mut tokenizer = tokenizers::Tokenizer::from_bytes(json).map_err(TokenizerError)?;
        // Some files cut texts, or fill them up, to the length that a training had.
        tokenizer.with_truncation(None).map_err(TokenizerError)?;
        tokenizer.with_padding(None);
        Ok(Self(Kind::File(Box::new(tokenizer))))
    }

    /// The tokens of a text, with those that begin any text of the model if `is_beginning`.
    pub fn encode(&self, text: &str, is_beginning: bool) -> Result<Vec<u32>, TokenizerError> {
        match &self.0 {
            Kind::File(tokenizer) => {
                let encoding = tokenizer.encode_fast(text, is_beginning);
                Ok(encoding.map_err(TokenizerError)?.get_ids().to_vec())
            }
            Kind::Bytes => Ok(text.bytes().map(u32::from).collect()),
        }
    }

    /// The text of tokens, without the special ones; `U+FFFD` for what is no whole character.
    pub fn decode(&self, ids: &[u32]) -> Result<String, TokenizerError> {
        match &self.0 {
            Kind::File(tokenizer) => tokenizer.decode(ids, true).map_err(TokenizerError),
            Kind::Bytes => {
                let bytes = ids.iter().filter_map(|id| u8::try_from(*id).ok());
                let bytes: Vec<_> = bytes.collect();
                Ok(String::from_utf8_lossy(&bytes).into_owned())
            }
        }
    }

    /// Whether there is a token of this number.
    pub fn has(&self, id: u32) -> bool {
        match &self.0 {
            Kind::File(tokenizer) => tokenizer.id_to_token(id).is_some(),
            Kind::Bytes => id <= BYTES_END_OF_TEXT,
        }
    }

    /// The number of a token such as `<|eot_id|>`.
    pub fn id_of(&self, token: &str) -> Option<u32> {
        match &self.0 {
            Kind::File(tokenizer) => tokenizer.token_to_id(token),
            Kind::Bytes => None,
        }
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            Kind::File(_) => "Tokenizer(tokenizer.json)",
            Kind::Bytes => "Tokenizer(bytes)",
        })
    }
}

/// Small tokenizers for tests.
#[cfg(test)]
pub(super) mod samples {
    use super::*;
    use serde_json::{Value, json};

    fn tokenizer(model: Value, rest: Value) -> Tokenizer {
        let mut file = json!({
            "version": "1.0", "normalizer": null, "pre_tokenizer": null, "post_processor": null,
            "decoder": null, "added_tokens": [], "truncation": null, "padding": null, "model": model,
        });
        for (name, value) in rest.as_object().unwrap() {
            file[name] = value.clone();
        }
        Tokenizer::from_json(file.to_string().as_bytes()).unwrap()
    }

    /// A BPE of bytes, as GPT-2's, with merges that cross the borders of characters.
    pub fn byte_level() -> Tokenizer {
        let alphabet = tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet();
        let mut tokens: Vec<_> = alphabet.into_iter().map(String::from).collect();
        tokens.sort();
        // The letters of the bytes of "é" and "ü" are "Ã©" and "Ã¼"; "©Ã" is between two of them.
        let merges = [("h", "e"), ("©", "Ã"), ("l", "l"), ("Ġ", "w")];
        tokens.extend(merges.map(|(left, right)| format!("{left}{right}")));
        let numbers = tokens.into_iter().zip(0..);
        let vocabulary: serde_json::Map<_, Value> =
            numbers.map(|(token, id)| (token, json!(id))).collect();
        let special = json!({
            "id": 260, "content": "<|end|>", "special": true, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false,
        });
        let level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
            "use_regex": true});
        let merges = merges.map(|(left, right)| format!("{left} {right}"));
        let model = json!({"type": "BPE", "vocab": vocabulary, "merges": merges});
        let truncation = json!({"direction": "Right", "max_length": 3, "stride": 0,
            "strategy": "LongestFirst"});
        let rest = json!({"pre_tokenizer": level, "decoder": level, "added_tokens": [special],
            "truncation": truncation});
        tokenizer(model, rest)
    }

    /// Words as Llama 2 has them: `▁` is a space, unknown characters are bytes, `<s>` begins a text.
    pub fn byte_fallback() -> Tokenizer {
        let words = ["<unk>", "<s>", "▁", "▁a", "a"].map(str::to_owned);
        let bytes = (0..=255).map(|byte| format!("<0x{byte:02X}>"));
        let tokens = words.into_iter().chain(bytes).zip(0..);
        let vocabulary: serde_json::Map<_, Value> =
            tokens.map(|(token, id)| (token, json!(id))).collect();
        let special = json!({
            "id": 1, "content": "<s>", "special": true, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false,
        });
        let model = json!({"type": "BPE", "vocab": vocabulary, "byte_fallback": true,
            "unk_token": "<unk>", "fuse_unk": true,
            "merges": ["▁ a"]});
        let normalizer = json!({"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]});
        let decoder = json!({"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]});
        let begin = json!({"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}});
        let rest = json!({"normalizer": normalizer, "decoder": decoder, "added_tokens": [special],
            "post_processor": begin});
        tokenizer(model, rest)
    }
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn bytes_are_tokens() {
        let tokenizer = Tokenizer::bytes();
        assert_eq!(tokenizer.encode("aé", true).unwrap(), [97, 195, 169]);
        let decoded = tokenizer.decode(&[97, 195, 169, BYTES_END_OF_TEXT, 98]);
        assert_eq!(decoded.unwrap(), "aéb");
        assert_eq!(tokenizer.decode(&[195, 98]).unwrap(), "\u{FFFD}b");
        assert!(tokenizer.has(256) && !tokenizer.has(257));
    }

    #[test]
    fn a_file_says_how_text_is_cut() {
        let tokenizer = samples::byte_level();
        let text = "hello wé<|end|>";
        let ids = tokenizer.encode(text, true).unwrap();
        // "he", "ll", "o", " w", the two bytes of "é", the end; the file's truncation is not heeded.
        assert_eq!(ids.len(), 7);
        assert_eq!(ids.last(), Some(&260));
        assert_eq!(tokenizer.id_of("<|end|>"), Some(260));
        assert_eq!(tokenizer.decode(&ids).unwrap(), "hello wé");
        assert!(tokenizer.has(260) && !tokenizer.has(261));
    }

    #[test]
    fn only_a_beginning_gets_the_token_for_it() {
        let tokenizer = samples::byte_fallback();
        let [with, without] = [true, false].map(|it| tokenizer.encode("a", it).unwrap());
        assert_eq!(with[..1], [1]);
        assert_eq!(with[1..], without);
    }

    #[test]
    fn a_broken_file_is_an_error() {
        let error = Tokenizer::from_json(b"{}").unwrap_err();
        assert!(error.to_string().starts_with("the tokenizer: "), "{error}");
    }
}
