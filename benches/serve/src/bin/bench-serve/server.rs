//! The server's own program, as a child.

use crate::policy::Policy;
use crate::settings::Server;
use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, ChildStdout, Command};
use tokio::time::timeout;

/// For how long a server may make its models: billions of random weights take a while.
const START_TIMEOUT: Duration = Duration::from_secs(600);
/// For how long a server that has nothing to do may take to end.
const STOP_TIMEOUT: Duration = Duration::from_secs(60);

/// A server that listens. It is killed if it is dropped.
pub struct Running {
    child: Child,
    pub url: String,
    /// Held open, so that the server can print.
    _output: BufReader<ChildStdout>,
}

/// The names of this many models.
pub fn names(models: usize) -> Vec<String> {
    (1..=models).map(|number| format!("m{number}")).collect()
}

/// The server's arguments: only the policy's flag differs between servers of a workload.
pub fn flags(server: &Server, models: usize, policy: Policy, device: Option<&str>) -> Vec<String> {
    let model = |name| format!("{name}={}", server.model);
    let models: Vec<_> = names(models).into_iter().map(model).collect();
    let mut flags = vec![
        ("models", models.join(",")),
        ("listen", "127.0.0.1:0".to_owned()),
        ("dtype", server.dtype.clone()),
        ("memory", server.memory_mib.to_string()),
        ("sequences", server.sequences.to_string()),
        ("waiting", server.waiting.to_string()),
        ("step-tokens", server.step_tokens.to_string()),
        ("policy", policy.flag().to_owned()),
    ];
    flags.extend(device.map(|device| ("device", device.to_owned())));
    let flags = flags.into_iter();
    flags
        .flat_map(|(name, value)| [format!("--{name}"), value])
        .collect()
}

impl Running {
    /// Starts the program and waits until it listens.
    ///
    /// # Errors
    ///
    /// If it cannot be started, or ends, or does not listen in time.
    pub async fn start(program: &Path, flags: &[String]) -> Result<Self> {
        let mut command = Command::new(program);
        command.args(flags).stdin(Stdio::null());
        command.stdout(Stdio::piped()).kill_on_drop(true);
        if std::env::var_os("RUST_LOG").is_none() {
            command.env("RUST_LOG", "warn");
        }
        let name = program.display();
        let child = command.spawn();
        let mut child = child.with_context(|| format!("{name} cannot be started"))?;
        let output = child.stdout.take().context("no output of the server")?;
        let mut output = BufReader::new(output);
        let listens = timeout(START_TIMEOUT, url(&mut output)).await;
        let url = listens.context("the server does not listen in time")??;
        Ok(Self {
            child,
            url,
            _output: output,
        })
    }

    /// Ends the server as ctrl-C does, and waits for it.
    ///
    /// # Errors
    ///
    /// If it does not end in time, or ends with another code than 0.
    pub async fn stop(mut self) -> Result<()> {
        let pid = self.child.id().context("the server has ended by itself")?;
        let pid = Pid::from_raw(pid.try_into().context("the server's process")?);
        kill(pid, Signal::SIGINT).context("the server cannot be told to end")?;
        let ended = timeout(STOP_TIMEOUT, self.child.wait()).await;
        let status = ended.context("the server does not end")??;
        ensure!(status.success(), "the server failed: {status}");
        Ok(())
    }
}

/// Reads where a server listens.
async fn url(output: &mut (impl AsyncBufReadExt + Unpin)) -> Result<String> {
    let mut lines = output.lines();
    while let Some(line) = lines.next_line().await? {
        if let Some(url) = line.strip_prefix("listening on ") {
            return Ok(url.to_owned());
        }
    }
    bail!("the server ended before it listened")
}
