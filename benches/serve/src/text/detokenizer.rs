//! Tokens into text, one at a time.

use crate::text::tokenizer::{Tokenizer, TokenizerError};
use std::sync::Arc;

/// How many tokens of the prompt the first tokens are read with.
const CONTEXT: usize = 5;

/// After so many tokens without a whole character between them, their text is given as it is.
const WINDOW_MAX: usize = 64;

/// What stands for bytes that are no character, or not one yet.
const BROKEN: char = '\u{FFFD}';

/// Gives the text of tokens as they come, in whole characters.
///
/// A token's text depends on those before it: a character's bytes may be spread over tokens, and the
/// first word of a text has no space in front. So it decodes each token with a few before it, and
/// gives what is new.
#[derive(Debug)]
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    /// The last tokens: some for context, then those whose text is not all given.
    ids: Vec<u32>,
    /// How many of them are context.
    context: usize,
    /// What is given of their text, that of the context included.
    given: String,
}

impl Detokenizer {
    /// Goes on from the tokens of a prompt, whose text it does not give.
    pub fn new(tokenizer: Arc<Tokenizer>, prompt: &[u32]) -> Result<Self, TokenizerError> {
        let mut ids = &prompt[prompt.len().saturating_sub(CONTEXT)..];
        let mut given = tokenizer.decode(ids)?;
        // The cut may have gone through a character.
        while given.starts_with(BROKEN) {
            ids = &ids[1..];
            given = tokenizer.decode(ids)?;
        }
        given.truncate(whole(&given).len());
        let (context, ids) = (ids.len(), ids.to_vec());
        Ok(Self {
            tokenizer,
            ids,
            context,
            given,
        })
    }

    /// The text that is whole with this token; it may be empty.
    pub fn push(&mut self, id: u32) -> Result<String, TokenizerError> {
        self.ids.push(id);
        let text = self.tokenizer.decode(&self.ids)?;
        if self.ids.len() > CONTEXT + WINDOW_MAX {
            let rest = self.rest(&text)?;
            (self.context, self.given) = (0, String::new());
            self.ids.clear();
            return Ok(rest);
        }
        let whole = whole(&text);
        if whole.len() < text.len() {
            // A decoder may take back what it gave of the bytes before, until the character is whole.
            let Some(new) = whole.strip_prefix(&*self.given) else {
                return Ok(String::new());
            };
            let new = new.to_owned();
            self.given.push_str(&new);
            return Ok(new);
        }
        let new = self.rest(&text)?;
        // A token without text is no context.
        if !new.is_empty() {
            self.ids.drain(..self.context);
            self.context = self.ids.len();
            self.given = self.tokenizer.decode(&self.ids)?;
        }
        Ok(new)
    }

    /// What is left once there are no more tokens, with `U+FFFD` for a character that is not whole.
    pub fn finish(&self) -> Result<String, TokenizerError> {
        self.rest(&self.tokenizer.decode(&self.ids)?)
    }

    /// What is not given of the text of all `ids`.
    fn rest(&self, text: &str) -> Result<String, TokenizerError> {
        match text.strip_prefix(&*self.given) {
            Some(new) => Ok(new.to_owned()),
            None => self.tokenizer.decode(&self.ids[self.context..]),
        }
    }
}

/// The text without what may be the beginning of a character, which is up to three bytes.
fn whole(text: &str) -> &str {
    let cut = |text| str::strip_suffix(text, BROKEN).unwrap_or(text);
    cut(cut(cut(text)))
}

#[cfg(test)]
mod unit {
    use super::*;
    use crate::text::tokenizer::samples;
    use proptest::prelude::*;

    fn pieces(tokenizer: Tokenizer, prompt: &[u32], ids: &[u32]) -> Vec<String> {
        let mut detokenizer = Detokenizer::new(Arc::new(tokenizer), prompt).unwrap();
        let pieces = ids.iter().map(|id| detokenizer.push(*id).unwrap());
        let mut pieces: Vec<_> = pieces.collect();
        pieces.push(detokenizer.finish().unwrap());
        pieces
    }

    #[test]
    fn a_character_comes_with_its_last_byte() {
        let ids = Tokenizer::bytes().encode("aé😀", false).unwrap();
        let expected = ["a", "", "é", "", "", "", "😀", ""];
        assert_eq!(pieces(Tokenizer::bytes(), &[], &ids), expected);
    }

    #[test]
    fn what_is_not_whole_comes_broken_at_the_end() {
        let found = pieces(Tokenizer::bytes(), &[], &[97, 0xF0, 0x9F]);
        assert_eq!(found, ["a", "", "", "\u{FFFD}"]);
        // It was no beginning after all.
        let found = pieces(Tokenizer::bytes(), &[], &[0xF0, 0x9F, 98]);
        assert_eq!(found, ["", "", "\u{FFFD}b", ""]);
    }

    #[test]
    fn tokens_may_hold_parts_of_two_characters() {
        let tokenizer = samples::byte_level();
        let ids = tokenizer.encode("ééé", false).unwrap();
        assert_eq!(ids.len(), 4, "the middle ones are half and half");
        assert_eq!(pieces(tokenizer, &[], &ids), ["", "é", "é", "é", ""]);
    }

    #[test]
    fn special_tokens_have_no_text() {
        let tokenizer = samples::byte_level();
        let ids = tokenizer.encode("he<|end|> wé", false).unwrap();
        let expected = ["he", "", " w", "", "é", ""];
        assert_eq!(pieces(tokenizer, &[], &ids), expected);
    }

    #[test]
    fn a_word_keeps_its_space_behind_a_prompt() {
        let prompt = samples::byte_fallback().encode("a", true).unwrap();
        let space = samples::byte_fallback().id_of("▁a").unwrap();
        let found = pieces(samples::byte_fallback(), &prompt, &[space, space]);
        assert_eq!(found, [" a", " a", ""]);
        let found = pieces(samples::byte_fallback(), &[], &[space, space]);
        assert_eq!(found, ["a", " a", ""]);
    }

    #[test]
    fn bytes_that_a_decoder_takes_back_are_given_once() {
        let tokenizer = samples::byte_fallback();
        let byte = |byte: u8| tokenizer.id_of(&format!("<0x{byte:02X}>")).unwrap();
        let ids: Vec<_> = "é你é".bytes().map(byte).collect();
        let broken = [0xC3, 0xA9, 0xE4, 0xBD, 0x61].map(byte);
        let found = pieces(samples::byte_fallback(), &[], &ids);
        assert_eq!(found, ["", "é", "", "", "你", "", "é", ""]);
        // "é" came before the bytes that are none.
        let found = pieces(samples::byte_fallback(), &[], &broken).concat();
        assert!(found.starts_with("é\u{FFFD}"), "{found:?}");
    }

    #[test]
    fn a_prompt_may_end_within_a_character() {
        let prompt = [b'a', b'b', b'c', 0xE4, 0xBD].map(u32::from);
        assert_eq!(pieces(Tokenizer::bytes(), &prompt, &[0xA0]), ["你", ""]);
        // The last tokens of a prompt may begin within one.
        let prompt = "你好".bytes().map(u32::from).collect::<Vec<_>>();
        assert_eq!(pieces(Tokenizer::bytes(), &prompt, &[97]), ["a", ""]);
        assert_eq!(pieces(Tokenizer::bytes(), &[0x80; 9], &[97]), ["a", ""]);
    }

    #[test]
    fn bytes_that_are_never_whole_do_not_pile_up() {
        let mut detokenizer = Detokenizer::new(Arc::new(Tokenizer::bytes()), &[]).unwrap();
        let mut text = String::new();
        for _ in 0..10_000 {
            text += &detokenizer.push(0xFF).unwrap();
            assert!(detokenizer.ids.len() <= CONTEXT + WINDOW_MAX);
        }
        text += &detokenizer.finish().unwrap();
        assert_eq!(text.chars().count(), 10_000);
    }

    proptest! {
        #[test]
        fn the_pieces_are_the_text(text in any::<String>(), prompt in "[aé你😀]{0,4}") {
            for make in [Tokenizer::bytes, samples::byte_level] {
                let [prompt, ids] = [&prompt, &text].map(|it| make().encode(it, false).unwrap());
                prop_assert_eq!(pieces(make(), &prompt, &ids).concat(), &*text);
            }
        }

        #[test]
        fn bytes_that_are_no_text_are_read_as_a_whole(bytes in prop::collection::vec(0u8.., ..60)) {
            let ids: Vec<_> = bytes.iter().map(|byte| u32::from(*byte)).collect();
            let found = pieces(Tokenizer::bytes(), &[], &ids).concat();
            prop_assert_eq!(found, String::from_utf8_lossy(&bytes));
        }
    }
}
