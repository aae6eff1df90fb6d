//! The program that measures, with the real server as its child.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

const BENCH: &str = env!("CARGO_BIN_EXE_bench-serve");
const SERVER: &str = env!("CARGO_BIN_EXE_cuda-vmm-serve");

/// A few requests of a tiny model in each workload. A page in each of four tensors is 8 MiB.
const WORKLOADS: &str = r#"
[server]
model = "tiny"
dtype = "f32"
memory_mib = 48
token_bytes = 512
sequences = 4
waiting = 100
step_tokens = 64
[ramps]
models = 2
tokens = { prompt = 20, generated = 3 }
peaks = [8]
speed = 4
seeds = 1
unloaded = 2
[traces]
start_seconds = 1
seconds = 1
stretch = 0.5
tokens_max = { prompt = 30, generated = 4 }
seeds = 1
[idle]
idle_models = 1
idle_rate = 2
idle_seconds = 1
apart_seconds = 1
busy_rate = 4
busy_seconds = 1
tokens = { prompt = 20, generated = 3 }
seeds = 1
[hand_over]
fill = 4
fill_tokens = { prompt = 20, generated = 3 }
then = 12
then_tokens = { prompt = 20, generated = 2 }
seeds = 1
[closed]
clients = [2]
requests_per_client = 3
tokens = { prompt = 20, generated = 3 }
seeds = 1
sequences = 2
memory_mib = 48
"#;

const TRACE: &str = "TIMESTAMP,ContextTokens,GeneratedTokens\n\
    2023-11-16 18:15:46.0,5,1\n2023-11-16 18:15:47.2,500,2\n2023-11-16 18:15:47.4,9,0\n";

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::write(folder.path().join("workloads.toml"), WORKLOADS).expect("a file");
        std::fs::write(folder.path().join("trace.csv"), TRACE).expect("a file");
        Self(folder)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// The program with this server, whose workloads are those of the folder.
    fn command(&self, server: &Path) -> Command {
        let mut command = Command::new(BENCH);
        command.arg("--workloads").arg(self.path("workloads.toml"));
        command.args(["--device", "cpu", "--server"]).arg(server);
        command
    }

    fn run(&self, server: &Path, arguments: &[&str]) -> Output {
        let output = self.command(server).args(arguments).output();
        output.expect("the program starts")
    }
}

#[test]
fn all_workloads_run_under_all_policies() {
    let folder = Folder::new();
    let mut command = folder.command(Path::new(SERVER));
    command.arg("--trace").arg(folder.path("trace.csv"));
    command.arg("--json").arg(folder.path("all.json"));
    command.arg("--plots").arg(folder.path("plots"));
    let output = command.output().expect("the program starts");
    assert!(output.status.success(), "{output:?}");

    let json = std::fs::read(folder.path("all.json")).expect("a file");
    let report: Value = serde_json::from_slice(&json).expect("JSON");
    assert_eq!(report["file"], WORKLOADS);
    assert_eq!(report["servers"].as_array().map(Vec::len), Some(5 * 4));
    let runs = report["runs"].as_array().expect("runs");
    // The ramps have an unloaded run and one peak.
    assert_eq!(runs.len(), 6 * 4);
    let of = |policy: &str| {
        let runs = runs.iter().filter(|run| run["policy"] == policy);
        runs.collect::<Vec<_>>()
    };
    for policy in ["static", "page-at-a-time", "elastic", "ideal"] {
        for (run, other) in of(policy).into_iter().zip(of("static")) {
            let of = format!("{policy}, {}", run["workload"]);
            let requests = run["requests"].as_array().expect("requests");
            let others = other["requests"].as_array().expect("requests");
            assert_eq!(requests.len(), others.len(), "{of}");
            for (request, other) in requests.iter().zip(others) {
                assert_eq!(request["prompt_tokens"], other["prompt_tokens"], "{of}");
                check(request, run["workload"] == "handover");
            }
            let memory = run["memory"].as_array().expect("memory");
            let held = memory.iter().map(|it| it["committed_bytes"][0].as_u64());
            assert!(held.max().flatten().is_some_and(|bytes| bytes > 0), "{of}");
        }
    }
    let text = String::from_utf8(output.stdout).expect("text");
    for words in [
        "(a) ramps: peak 8",
        "static ÷ elastic",
        "measured and simulated",
        "Steps without prompts",
        "(e) closed loop: 2 clients",
    ] {
        assert!(text.contains(words), "{words}: {text}");
    }
    for plot in [
        "ramps",
        "ramps-8",
        "traces",
        "idle",
        "hand-over",
        "closed-2",
    ] {
        let file = folder.path("plots").join(format!("{plot}.svg"));
        let svg = std::fs::read_to_string(file).expect(plot);
        assert!(svg.contains("</svg>"), "{plot}");
    }
}

/// A request has all its tokens in the order of time, or was refused, if it may be.
fn check(request: &Value, may_be_refused: bool) {
    let number = |name: &str| request[name].as_u64();
    if may_be_refused && number("status") == Some(503) {
        assert_eq!(number("retry_after"), Some(1), "{request}");
        return;
    }
    assert_eq!(number("status"), Some(200), "{request}");
    assert_eq!(request["failure"], Value::Null);
    assert_eq!(request["tokens"], request["generated_tokens_asked"]);
    let gaps = request["token_gaps_us"].as_array().expect("gaps");
    let sum: u64 = gaps.iter().filter_map(Value::as_u64).sum();
    assert_eq!(gaps.len() as u64 + 1, number("tokens").expect("tokens"));
    let first = number("first_token_us").expect("a token");
    assert!(number("planned_us") <= number("sent_us"), "{request}");
    assert!(number("sent_us").expect("sent") < first, "{request}");
    assert!(
        first + sum <= number("end_us").expect("an end"),
        "{request}"
    );
}

#[test]
fn what_is_wrong_is_said_and_has_a_code() {
    let folder = Folder::new();
    let none = folder.run(&folder.path("nothing"), &[]);
    assert_eq!(none.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&none.stderr).contains("there is no server"));
    let usage = folder.run(Path::new(SERVER), &["--only", "z"]);
    assert_eq!(usage.status.code(), Some(64));
    // A server that ends before it listens.
    let ended = folder.run(Path::new("/bin/true"), &["--only", "e"]);
    assert_eq!(ended.status.code(), Some(1));
    let text = String::from_utf8_lossy(&ended.stderr);
    assert!(text.contains("ended before it listened"), "{text}");
    let traces = folder.run(Path::new(SERVER), &["--only", "b"]);
    assert!(traces.status.success());
    let text = String::from_utf8_lossy(&traces.stdout);
    assert!(text.contains("(b) traces: not run"), "{text}");
}

/// Waits until something is so.
fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !is_so() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Whether a process runs; one that has ended and is not yet waited for does not.
fn runs(pid: &str) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"));
    let stat = stat.unwrap_or_default();
    let state = stat.rsplit_once(") ").map(|(_, rest)| rest);
    state.is_some_and(|rest| !rest.starts_with(['Z', 'X']))
}

#[test]
fn no_server_stays_behind_if_the_program_is_interrupted() {
    let folder = Folder::new();
    // A server that says which process it is.
    let (script, pid_file) = (folder.path("server.sh"), folder.path("pid"));
    let text = format!(
        "#!/bin/sh\necho $$ > '{}'\nexec '{SERVER}' \"$@\"\n",
        pid_file.display()
    );
    std::fs::write(&script, text).expect("a file");
    std::fs::set_permissions(&script, PermissionsExt::from_mode(0o700)).expect("a program");
    let mut command = folder.command(&script);
    let command = command.args(["--only", "a", "--seeds", "1000"]);
    let mut program = command.stdout(Stdio::null()).spawn().expect("it starts");
    let pid = || std::fs::read_to_string(&pid_file).unwrap_or_default();
    wait_until("the server", || pid().ends_with('\n'));
    let server = pid().trim().to_owned();
    assert!(runs(&server), "process {server}");
    let own = Pid::from_raw(program.id().try_into().expect("a process"));
    kill(own, Signal::SIGINT).expect("it runs");
    let mut status = None;
    wait_until("the program's end", || {
        status = program.try_wait().expect("its status");
        status.is_some()
    });
    assert_eq!(status.and_then(|status| status.code()), Some(1));
    wait_until("the server's end", || !runs(&server));
}
