//! Strings that end a text.

/// Lets text through up to the first string that ends it, which may come in pieces.
///
/// The string whose last character comes first counts; of two with the same, the longer. So it makes
/// no difference how the text is cut.
#[derive(Clone, Debug)]
pub struct StopStrings {
    strings: Vec<String>,
    /// What may be the beginning of one.
    held: String,
    is_found: bool,
}

impl StopStrings {
    /// Looks for these strings. None of them is empty.
    pub fn new(strings: Vec<String>) -> Self {
        Self {
            strings,
            held: String::new(),
            is_found: false,
        }
    }

    /// Whether one was found. No text comes after it.
    pub fn is_found(&self) -> bool {
        self.is_found
    }

    /// The text that is surely before any of the strings, once this comes.
    pub fn push(&mut self, text: &str) -> String {
        if self.is_found {
            return String::new();
        }
        self.held.push_str(text);
        let found = self.strings.iter().filter_map(|string| {
            let at = self.held.find(&**string)?;
            Some((at + string.len(), at))
        });
        let kept = match found.min() {
            Some((_, at)) => {
                self.is_found = true;
                self.held.truncate(at);
                String::new()
            }
            None => self.held.split_off(self.possible_beginning()),
        };
        std::mem::replace(&mut self.held, kept)
    }

    /// What was held back, once there is no more text.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Where the longest end of the held text begins that one of the strings begins with.
    fn possible_beginning(&self) -> usize {
        let lengths = self.strings.iter().map(String::len);
        let first = self.held.len().saturating_sub(lengths.max().unwrap_or(0));
        let mut places = (first..self.held.len()).filter(|at| self.held.is_char_boundary(*at));
        let is_beginning = |at: &usize| {
            let end = &self.held[*at..];
            self.strings.iter().any(|string| string.starts_with(end))
        };
        places.find(is_beginning).unwrap_or(self.held.len())
    }
}

#[cfg(test)]
mod unit {
    use super::*;
    use proptest::prelude::*;

    /// What comes through, piece by piece, and whether a string was found.
    fn run(strings: &[impl AsRef<str>], pieces: &[impl AsRef<str>]) -> (Vec<String>, bool) {
        let strings = strings.iter().map(|it| it.as_ref().to_owned());
        let mut stops = StopStrings::new(strings.collect());
        let texts = pieces.iter().map(|piece| stops.push(piece.as_ref()));
        let mut texts: Vec<_> = texts.collect();
        texts.push(stops.finish());
        (texts, stops.is_found())
    }

    fn expect(strings: &[&str], pieces: &[&str], texts: &[&str], is_found: bool) {
        let texts = texts.iter().map(|it| (*it).to_owned()).collect();
        assert_eq!(run(strings, pieces), (texts, is_found), "{strings:?}");
    }

    #[test]
    fn a_string_over_pieces_ends_the_text() {
        let pieces = ["one ST", "O", "P two", "three"];
        expect(&["STOP"], &pieces, &["one ", "", "", "", ""], true);
    }

    #[test]
    fn what_was_no_beginning_comes_late() {
        expect(
            &["STOP"],
            &["ST", "OL", "ST"],
            &["", "STOL", "", "ST"],
            false,
        );
        expect(&["aab"], &["aa", "a", "b"], &["", "a", "", ""], true);
        expect(&[], &["a", "b"], &["a", "b", ""], false);
    }

    #[test]
    fn the_string_that_is_whole_first_counts() {
        for pieces in [&["xabc"][..], &["xab", "c"], &["x", "a", "b", "c"]] {
            let (texts, _) = run(&["abc", "b"], pieces);
            assert_eq!(texts.concat(), "xa", "{pieces:?}");
            let (texts, _) = run(&["c", "abc"], pieces);
            assert_eq!(texts.concat(), "x", "{pieces:?}");
        }
    }

    #[test]
    fn strings_may_have_any_characters() {
        expect(&["é😀"], &["aé", "😀"], &["a", "", ""], true);
        expect(&["é😀"], &["aé", "é"], &["a", "é", "é"], false);
    }

    proptest! {
        #[test]
        fn it_makes_no_difference_how_the_text_is_cut(
            strings in prop::collection::vec("[abé]{1,4}", ..4),
            pieces in prop::collection::vec("[abé]{0,5}", ..9),
        ) {
            let (texts, is_found) = run(&strings, &pieces);
            let (whole, is_found_whole) = run(&strings, &[pieces.concat()]);
            prop_assert_eq!(texts.concat(), whole.concat());
            prop_assert_eq!(is_found, is_found_whole);
            let has = strings.iter().any(|string| pieces.concat().contains(string));
            prop_assert_eq!(is_found, has);
        }
    }
}
