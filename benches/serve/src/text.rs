//! Text: its tokens, the prompt that a chat becomes, and the strings that end it.

mod chat_template;
mod detokenizer;
mod stop_strings;
mod tokenizer;

pub use chat_template::{ChatTemplate, Message, Role, TemplateError};
pub use detokenizer::Detokenizer;
pub use stop_strings::StopStrings;
pub use tokenizer::{BYTES_END_OF_TEXT, Tokenizer, TokenizerError};
