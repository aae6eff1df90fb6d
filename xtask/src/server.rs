//! The checks of the server: its own tests, and OpenAI's own client against it.

use crate::gpu_test::SERVER as PACKAGE;
use crate::workspace::Workspace;
use crate::{setup, tests};
use anyhow::{Context, Result, ensure};
use fs_err as fs;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::path::Path;
use std::process::{Child, Command, ExitStatus};
use std::thread::sleep;
use std::time::{Duration, Instant};
use wait_timeout::ChildExt;

const CLIENT: &str = "benches/serve/tests/openai_client.py";
/// What the server prints before its address.
const LISTENS: &str = "listening on ";
/// How long the server may take to begin and to end, and the client to do all.
const LIMIT: Duration = Duration::from_secs(300);

/// Runs the tests of the server, and then a client of Python that no one here wrote.
pub fn run(workspace: &Workspace) -> Result<()> {
    setup::ensure(workspace, false, false)?;
    let package = format!("--package {PACKAGE}");
    tests::run_packages(workspace, &package, &package)?;
    let packages = setup::ensure_client(workspace)?;
    let output = workspace.target.join("server.txt");
    let mut server = Command::from(workspace.cargo(&format!("build {package}")));
    ensure!(server.status()?.success(), "the server cannot be built");
    let mut server = Command::new(workspace.target.join("debug").join(PACKAGE));
    server.args(["--listen", "127.0.0.1:0"]);
    server.stdout(fs::File::create(&output)?.into_file());
    let mut server = Running(server.spawn().context("the server could not be started")?);
    let address = server.address(&output)?;
    let mut client = Command::new("python3");
    client.arg(workspace.root.join(CLIENT));
    client.args([&format!("{address}/v1"), "tiny"]);
    client.env("PYTHONPATH", packages).env("NO_PROXY", "*");
    let mut client = Running(client.spawn().context("python3 could not be started")?);
    let end = client.end("the client")?;
    ensure!(end.success(), "the client ended with {end}");
    kill(server.id(), Signal::SIGINT)?;
    let end = server.end("the server")?;
    ensure!(end.success(), "the server ended with {end} after ctrl-C");
    Ok(())
}

/// A process that does not outlive this value.
struct Running(Child);

impl Running {
    fn id(&self) -> Pid {
        Pid::from_raw(self.0.id().cast_signed())
    }

    fn end(&mut self, name: &str) -> Result<ExitStatus> {
        let end = self.0.wait_timeout(LIMIT)?;
        end.with_context(|| format!("{name} has not ended within {LIMIT:?}"))
    }

    /// Waits until the server says where it listens.
    fn address(&mut self, output: &Path) -> Result<String> {
        let until = Instant::now() + LIMIT;
        loop {
            let text = fs::read_to_string(output)?;
            let line = text.lines().next().filter(|_| text.ends_with('\n'));
            if let Some(address) = line.and_then(|line| line.strip_prefix(LISTENS)) {
                return Ok(address.to_owned());
            }
            if let Some(end) = self.0.try_wait()? {
                anyhow::bail!("the server ended with {end}");
            }
            ensure!(Instant::now() < until, "the server does not listen");
            sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // One that has ended is none of our concern.
        _ = self.0.kill();
        _ = self.0.wait();
    }
}
