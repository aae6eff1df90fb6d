//! An engine that says what a test wants.

use cuda_vmm_serve::api;
use cuda_vmm_serve::figures::{Figures, ModelFigures};
use cuda_vmm_serve::request::{Backend, Ended, Event, FinishReason, Generate, ModelInfo, Refusal};
use cuda_vmm_serve::text::{BYTES_END_OF_TEXT, ChatTemplate, Tokenizer};
use serde_json::json;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::timeout;

/// No test waits longer for one thing.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// What the engine does with each request.
pub enum Script {
    /// A token a byte of the text, up to as many as are asked for, then the end.
    Say(&'static str),
    /// The same, and then a failure.
    FailAfter(&'static str),
    /// It drops the sender after that.
    DropAfter(&'static str),
    /// It takes no request.
    Refuse(Refusal),
    /// It takes a request, and refuses it then.
    RefuseLater(Refusal),
    /// The test sends the events.
    Manual(mpsc::UnboundedSender<mpsc::Sender<Event>>),
}

pub struct Fake {
    script: Script,
    asked: Mutex<Vec<Generate>>,
    is_healthy: bool,
    figures_taken: AtomicUsize,
}

impl Fake {
    /// How often the server has taken the figures.
    pub fn figures_taken(&self) -> usize {
        self.figures_taken.load(Ordering::Relaxed)
    }
}

/// The names of the models.
pub const BYTES: &str = "bytes";
/// Has room for 8 tokens.
pub const SMALL: &str = "small";
/// It sleeps.
pub const SLEEPY: &str = "sleepy";
/// Its template refuses every chat.
pub const STRICT: &str = "strict";
/// Its template uses what is not there.
pub const BROKEN: &str = "broken";

fn template(source: &str) -> ChatTemplate {
    let config = json!({ "chat_template": source }).to_string();
    let template = ChatTemplate::from_config(&config, None).unwrap();
    template.unwrap()
}

impl Backend for Fake {
    fn models(&self) -> Vec<ModelInfo> {
        let model = |id: &str, context_tokens_max, template| ModelInfo {
            id: id.to_owned(),
            created: 1_700_000_000,
            context_tokens_max,
            stop_ids: vec![BYTES_END_OF_TEXT],
            tokenizer: Arc::new(Tokenizer::bytes()),
            template: Arc::new(template),
            is_asleep: id == SLEEPY,
        };
        vec![
            model(BYTES, 1_000_000, ChatTemplate::plain()),
            model(SMALL, 8, ChatTemplate::plain()),
            model(STRICT, 100, template("{{ raise_exception('No chats.') }}")),
            model(BROKEN, 100, template("{{ nothing() }}")),
            model(SLEEPY, 100, ChatTemplate::plain()),
        ]
    }

    fn submit(&self, model: &str, ask: Generate) -> Result<mpsc::Receiver<Event>, Refusal> {
        assert!(self.model(model).is_some());
        let (sender, receiver) = ask.channel();
        let say = |text: &str| {
            // With as many tokens as are allowed, the channel has room for all and the end.
            for byte in text.bytes().take(ask.max_tokens) {
                let sent = sender.try_send(Event::Token(byte.into()));
                sent.expect("room for every event");
            }
        };
        match &self.script {
            Script::Say(text) => {
                say(text);
                let reason = match text.len() > ask.max_tokens {
                    true => FinishReason::Length,
                    false => FinishReason::Stop,
                };
                sender.try_send(Event::End(reason)).expect("room");
            }
            Script::FailAfter(text) => {
                say(text);
                let event = Event::Failed("a device fell over".to_owned());
                sender.try_send(event).expect("room");
            }
            Script::DropAfter(text) => say(text),
            Script::Refuse(refusal) => return Err(*refusal),
            Script::RefuseLater(refusal) => {
                sender.try_send(Event::Refused(*refusal)).expect("room");
            }
            Script::Manual(senders) => senders.send(sender.clone()).unwrap(),
        }
        self.asked.lock().unwrap().push(ask);
        Ok(receiver)
    }

    fn sleep(&self, model: &str) -> Result<Ended, Refusal> {
        self.model(model).ok_or(Refusal::UnknownModel)?;
        let (answer, ended) = oneshot::channel();
        match self.script {
            Script::Refuse(refusal) => return Err(refusal),
            Script::RefuseLater(refusal) => answer.send(Err(refusal)).expect("it waits"),
            Script::DropAfter(_) => {}
            _ => answer.send(Ok(())).expect("it waits"),
        }
        Ok(ended)
    }

    fn wake(&self, model: &str) -> Result<Ended, Refusal> {
        self.sleep(model)
    }

    fn figures(&self) -> Figures {
        let taken = self.figures_taken.fetch_add(1, Ordering::Relaxed);
        let models = self.models().into_iter().map(|model| ModelFigures {
            id: model.id,
            live_bytes: 3 << 20,
            generated_tokens: taken as u64,
            ..ModelFigures::default()
        });
        Figures {
            limit_bytes: 16 << 20,
            unowned_bytes: 0,
            free_bytes: 4 << 20,
            models: models.collect(),
        }
    }

    fn metrics(&self) -> String {
        "requests_total 1\n".to_owned()
    }

    fn is_healthy(&self) -> bool {
        self.is_healthy
    }
}

/// A server in front of a [`Fake`].
pub struct Server {
    pub address: SocketAddr,
    pub fake: Arc<Fake>,
    pub shutdown: oneshot::Sender<()>,
    pub served: JoinHandle<std::io::Result<()>>,
}

impl Server {
    pub async fn start(script: Script) -> Self {
        Self::start_with(script, true).await
    }

    pub async fn start_with(script: Script, is_healthy: bool) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let fake = Arc::new(Fake {
            script,
            asked: Mutex::default(),
            is_healthy,
            figures_taken: AtomicUsize::new(0),
        });
        let (shutdown, is_shut_down) = oneshot::channel();
        let served = api::serve(listener, fake.clone(), async {
            let _ = is_shut_down.await;
        });
        Self {
            address,
            fake,
            shutdown,
            served: tokio::spawn(served),
        }
    }

    /// A server whose events the test sends itself, request by request.
    pub async fn manual() -> (Self, mpsc::UnboundedReceiver<mpsc::Sender<Event>>) {
        let (sender, receiver) = mpsc::unbounded_channel();
        (Self::start(Script::Manual(sender)).await, receiver)
    }

    /// The last request that the engine got.
    pub fn asked(&self) -> Generate {
        self.fake.asked.lock().unwrap().last().unwrap().clone()
    }
}

/// What a future gives, within the time that a test waits.
pub async fn soon<T>(future: impl Future<Output = T>) -> T {
    timeout(PATIENCE, future).await.expect("it takes too long")
}
