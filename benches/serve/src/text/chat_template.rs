//! The text of a prompt that a chat becomes.

use minijinja::value::Kwargs;
use minijinja::{Environment, Error, ErrorKind, Value};
use minijinja_contrib::pycompat::unknown_method_callback;
use serde::{Deserialize, Serialize};
use serde_json::ser::{Formatter, PrettyFormatter};
use std::collections::BTreeMap;
use std::error::Error as _;
use std::fmt;
use std::io;

/// The template's name within its environment.
const NAME: &str = "chat";

/// Who says a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Tells the model what to be; newer clients call it `developer`.
    #[serde(alias = "developer")]
    System,
    /// Asks.
    User,
    /// The model.
    Assistant,
}

/// A message of a chat.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Message {
    /// Who says it.
    pub role: Role,
    /// What they say.
    pub content: String,
}

/// Turns a chat into the prompt that a model was trained with.
pub struct ChatTemplate {
    /// Without one, a line a message.
    environment: Option<Environment<'static>>,
    /// The special tokens by their names, for example `bos_token`.
    tokens: BTreeMap<&'static str, String>,
}

/// A template that is wrong, or a chat that it does not take.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// The configuration has another form.
    #[error("tokenizer_config.json: {0}")]
    Config(#[from] serde_json::Error),
    /// The template is wrong, or uses what is not there.
    #[error("the chat template: {0:#}")]
    Template(#[from] Error),
    /// The template itself refuses the chat.
    #[error("{0}")]
    Refused(String),
}

/// What is wanted of a `tokenizer_config.json`.
#[derive(Deserialize)]
struct Config {
    chat_template: Option<Templates>,
    bos_token: Option<Token>,
    eos_token: Option<Token>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Templates {
    One(String),
    Several(Vec<Named>),
}

#[derive(Deserialize)]
struct Named {
    name: String,
    template: String,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Token {
    Text(String),
    Added { content: String },
}

impl Token {
    fn text(self) -> String {
        match self {
            Self::Text(text) | Self::Added { content: text } => text,
        }
    }
}

impl ChatTemplate {
    /// A line a message, `user: Hello`, for models that were trained with no chats.
    pub fn plain() -> Self {
        Self {
            environment: None,
            tokens: BTreeMap::new(),
        }
    }

    /// The template of a `tokenizer_config.json`, or `source`, which is the content of a
    /// `chat_template.jinja` if the model has one. None if there is neither.
    pub fn from_config(
        config: &str,
        source: Option<String>,
    ) -> Result<Option<Self>, TemplateError> {
        let config: Config = serde_json::from_str(config)?;
        let own = match config.chat_template {
            Some(Templates::One(template)) => Some(template),
            Some(Templates::Several(all)) => {
                let mut all = all.into_iter();
                all.find(|it| it.name == "default").map(|it| it.template)
            }
            None => None,
        };
        let Some(source) = source.or(own) else {
            return Ok(None);
        };
        let tokens = [
            ("bos_token", config.bos_token),
            ("eos_token", config.eos_token),
        ];
        let tokens = tokens.into_iter();
        let tokens = tokens.filter_map(|(name, token)| Some((name, token?.text())));
        Ok(Some(Self {
            environment: Some(environment(source)?),
            tokens: tokens.collect(),
        }))
    }

    /// The token that ends a text, as the configuration names it.
    pub fn end_of_text(&self) -> Option<&str> {
        self.tokens.get("eos_token").map(String::as_str)
    }

    /// The prompt that asks the model for the next message. It has the token that begins a text, if
    /// the model wants one.
    pub fn render(&self, messages: &[Message]) -> Result<String, TemplateError> {
        let Some(environment) = &self.environment else {
            return Ok(plain(messages));
        };
        let mut values = BTreeMap::from([
            ("messages", Value::from_serialize(messages)),
            ("add_generation_prompt", Value::from(true)),
            // As transformers has them if a chat comes without.
            ("tools", Value::from(())),
            ("documents", Value::from(())),
        ]);
        let tokens = self.tokens.iter();
        values.extend(tokens.map(|(name, token)| (*name, Value::from(token))));
        let rendered = environment.get_template(NAME)?.render(values);
        rendered.map_err(|error| match refusal(&error) {
            Some(Refused(message)) => TemplateError::Refused(message.clone()),
            None => TemplateError::Template(error),
        })
    }
}

impl fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let is_plain = self.environment.is_none();
        let kind = if is_plain { "plain" } else { "a template" };
        write!(f, "ChatTemplate({kind}, {:?})", self.tokens)
    }
}

fn plain(messages: &[Message]) -> String {
    let lines = messages.iter().map(|message| {
        let role = match message.role {
            Role::System => "system",
            Role::User => "user",
            Role::Assistant => "assistant",
        };
        format!("{role}: {}\n", message.content)
    });
    lines.collect::<String>() + "assistant:"
}

/// An environment like that of transformers, which makes it of Python's Jinja.
fn environment(source: String) -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.set_unknown_method_callback(unknown_method_callback);
    environment.add_function("raise_exception", raise_exception);
    environment.add_filter("tojson", tojson);
    environment.add_template_owned(NAME, source)?;
    Ok(environment)
}

/// What a template says when it refuses a chat.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Refused(String);

fn raise_exception(message: String) -> Result<Value, Error> {
    let error = Error::new(ErrorKind::InvalidOperation, message.clone());
    Err(error.with_source(Refused(message)))
}

/// The refusal that an error comes from.
fn refusal(error: &Error) -> Option<&Refused> {
    let mut source = error.source();
    while let Some(error) = source {
        if let Some(refused) = error.downcast_ref() {
            return Some(refused);
        }
        source = error.source();
    }
    None
}

/// JSON as Python writes it, with spaces after commas and colons, and nothing escaped for HTML.
fn tojson(value: &Value, options: Kwargs) -> Result<String, Error> {
    let failed =
        |error: &dyn fmt::Display| Error::new(ErrorKind::BadSerialization, error.to_string());
    let mut json = Vec::new();
    let written = match options.get::<Option<usize>>("indent")? {
        Some(indent) => {
            let indent = " ".repeat(indent);
            write_json(
                value,
                &mut json,
                PrettyFormatter::with_indent(indent.as_bytes()),
            )
        }
        None => write_json(value, &mut json, Spaced),
    };
    written.map_err(|error| failed(&error))?;
    String::from_utf8(json).map_err(|error| failed(&error))
}

fn write_json(value: &Value, to: &mut Vec<u8>, form: impl Formatter) -> serde_json::Result<()> {
    value.serialize(&mut serde_json::Serializer::with_formatter(to, form))
}

struct Spaced;

impl Formatter for Spaced {
    fn begin_array_value<W: io::Write + ?Sized>(
        &mut self,
        to: &mut W,
        first: bool,
    ) -> io::Result<()> {
        to.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_key<W: io::Write + ?Sized>(
        &mut self,
        to: &mut W,
        first: bool,
    ) -> io::Result<()> {
        to.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_value<W: io::Write + ?Sized>(&mut self, to: &mut W) -> io::Result<()> {
        to.write_all(b": ")
    }
}

#[cfg(test)]
mod unit {
    use super::*;
    use serde_json::json;

    /// Of the kind that Llama 3 has.
    const TEMPLATE: &str = "\
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0].content.strip() %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = '' %}
{%- endif %}
{{- bos_token }}
{%- if tools is not none %}{{ raise_exception('There are no tools.') }}{% endif %}
{%- if system %}{{ '<|start|>system<|end|>\\n\\n' + system + '<|eot|>' }}{% endif %}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must take turns: ' ~ message | tojson) }}
    {%- endif %}
    {{- '<|start|>' + message['role'] + '<|end|>\\n\\n' + message['content'] | trim + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant<|end|>\\n\\n' }}
{%- endif %}
";

    fn chat(messages: &[(Role, &str)]) -> Vec<Message> {
        let message = |(role, content): &(Role, &str)| Message {
            role: *role,
            content: (*content).to_owned(),
        };
        messages.iter().map(message).collect()
    }

    fn template(source: &str) -> ChatTemplate {
        let config = json!({
            "chat_template": source,
            "bos_token": "<|begin|>",
            "eos_token": {"content": "<|eot|>", "special": true},
            "model_max_length": 8192,
        });
        let template = ChatTemplate::from_config(&config.to_string(), None);
        template.unwrap().unwrap()
    }

    #[test]
    fn a_chat_becomes_the_prompt_of_a_model() {
        let template = template(TEMPLATE);
        assert_eq!(template.end_of_text(), Some("<|eot|>"));
        let asked = template.render(&chat(&[
            (Role::System, " Be brief. "),
            (Role::User, "Hi <b>"),
            (Role::Assistant, "Hello\n"),
            (Role::User, "Bye {{ 1 }}"),
        ]));
        let expected = "<|begin|><|start|>system<|end|>\n\nBe brief.<|eot|>\
            <|start|>user<|end|>\n\nHi <b><|eot|><|start|>assistant<|end|>\n\nHello<|eot|>\
            <|start|>user<|end|>\n\nBye {{ 1 }}<|eot|><|start|>assistant<|end|>\n\n";
        assert_eq!(asked.unwrap(), expected);
    }

    #[test]
    fn a_template_may_refuse_a_chat() {
        let chat = chat(&[(Role::Assistant, "It's <é>")]);
        let error = template(TEMPLATE).render(&chat).unwrap_err();
        let TemplateError::Refused(message) = error else {
            panic!("{error}");
        };
        let expected = r#"Roles must take turns: {"role": "assistant", "content": "It's <é>"}"#;
        assert_eq!(message, expected);
    }

    #[test]
    fn a_template_that_is_wrong_is_told_from_a_refusal() {
        let error = template("{{ strftime_now('%d') }}")
            .render(&[])
            .unwrap_err();
        assert!(matches!(error, TemplateError::Template(_)), "{error}");
        let config = json!({"chat_template": "{% if %}"}).to_string();
        let error = ChatTemplate::from_config(&config, None).unwrap_err();
        assert!(matches!(error, TemplateError::Template(_)), "{error}");
        let error = ChatTemplate::from_config("[", None).unwrap_err();
        assert!(matches!(error, TemplateError::Config(_)), "{error}");
    }

    #[test]
    fn what_templates_of_python_use_is_there() {
        let source = "{% set it = namespace(n=0) %}{% for x in [1, 2, 3] %}{% if x == 3 %}{% break %}\
            {% endif %}{% set it.n = it.n + x %}{% endfor %}{{ it.n }} {{ 'a</t>b'.split('</t>')[-1] }} \
            {{ [1, {'k': '&'}] | tojson }} {{ [1] | tojson(indent=2) }} \
            {% macro m(x) %}<{{ x }}>{% endmacro %}{{ m('y') }} \
            {% if strftime_now is defined %}now{% else %}never{% endif %} \
            {% if x is undefined and ('q'.startswith('q')) %}yes{% endif %}";
        let expected = "3 b [1, {\"k\": \"&\"}] [\n  1\n] <y> never yes";
        assert_eq!(template(source).render(&[]).unwrap(), expected);
    }

    #[test]
    fn a_template_has_several_places() {
        let config = json!({"chat_template": [
            {"name": "tool_use", "template": "tools"}, {"name": "default", "template": "chat"},
        ]});
        let config = config.to_string();
        let render = |source: Option<&str>| {
            let template = ChatTemplate::from_config(&config, source.map(str::to_owned));
            template.unwrap().unwrap().render(&[]).unwrap()
        };
        assert_eq!(render(None), "chat");
        assert_eq!(render(Some("file")), "file");
        assert!(ChatTemplate::from_config("{}", None).unwrap().is_none());
    }

    #[test]
    fn the_plain_one_has_a_line_a_message() {
        let chat = chat(&[(Role::System, "Be."), (Role::User, "Hi")]);
        let prompt = ChatTemplate::plain().render(&chat).unwrap();
        assert_eq!(prompt, "system: Be.\nuser: Hi\nassistant:");
    }
}
