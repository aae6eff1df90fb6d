//! The program itself: its command line, and how it ends.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

/// Longer than anything here takes; a test that fails ends all the same.
const PATIENCE: Duration = Duration::from_secs(60);

/// A server on a free port. It does not outlive the test.
struct Program {
    child: Child,
    address: String,
    _stdout: BufReader<ChildStdout>,
    /// The lines that it tells.
    told: Receiver<String>,
}

fn start(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cuda-vmm-serve"));
    command.args(arguments).env("NO_COLOR", "1");
    command
}

impl Program {
    fn start(arguments: &[&str]) -> Self {
        let mut command = start(&["--listen", "127.0.0.1:0"]);
        command.args(arguments);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let (tell, told) = channel();
        std::thread::spawn(move || {
            let mut lines = stderr.lines().map_while(Result::ok);
            lines.all(|line| tell.send(line).is_ok())
        });
        let mut line = String::new();
        stdout.read_line(&mut line).unwrap();
        let address = line.trim_end().strip_prefix("listening on http://");
        let address = address.expect(&line).to_owned();
        Self {
            child,
            address,
            _stdout: stdout,
            told,
        }
    }

    /// Sends a request whose connection ends with its response.
    fn send(&self, method: &str, path: &str, body: &str) -> TcpStream {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let length = body.len();
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\
             content-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
        )
        .unwrap();
        stream
    }

    /// Begins a text of so many tokens, and waits until some of it came.
    fn begin_text(&self, tokens: usize) -> TcpStream {
        let body = format!(
            r#"{{"model": "m", "prompt": "a", "max_tokens": {tokens}, "stream": true,
            "temperature": 0}}"#
        );
        let mut stream = self.send("POST", "/v1/completions", &body);
        let mut some = [0; 256];
        assert!(stream.read(&mut some).unwrap() > 0);
        stream
    }

    fn interrupt(&self) {
        let process = Pid::from_raw(self.child.id().cast_signed());
        kill(process, Signal::SIGINT).unwrap();
    }

    /// Waits until it tells a line with this text.
    fn await_line(&mut self, text: &str) {
        let line = || self.told.recv_timeout(PATIENCE).expect(text);
        while !line().contains(text) {}
    }

    fn end(&mut self) -> ExitStatus {
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some(end) = self.child.try_wait().unwrap() {
                return end;
            }
            assert!(Instant::now() < until, "the server does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // One that has ended is none of our concern.
        _ = self.child.kill();
        _ = self.child.wait();
    }
}

fn rest(mut stream: TcpStream) -> String {
    let mut bytes = Vec::new();
    // A connection that is cut off may end with an error.
    _ = stream.read_to_end(&mut bytes);
    String::from_utf8_lossy(&bytes).into_owned()
}

#[test]
fn ctrl_c_lets_what_runs_end_and_takes_no_more() {
    let mut program = Program::start(&["--models", "m=tiny", "--drain", "3600"]);
    let running = program.begin_text(300);
    program.interrupt();
    program.await_line("no more requests are taken");
    let text = rest(running);
    assert!(text.contains("data: [DONE]"), "{text}");
    assert!(program.end().success());
    assert!(TcpStream::connect(&program.address).is_err());
}

#[test]
fn ctrl_c_again_or_the_end_of_the_time_cuts_off_what_runs() {
    for (drain, is_again) in [("0", false), ("3600", true)] {
        // Texts that take long.
        let mut program = Program::start(&["--models", "m=wide", "--drain", drain]);
        let running: Vec<_> = (0..4).map(|_| program.begin_text(900)).collect();
        program.interrupt();
        program.await_line("no more requests are taken");
        if is_again {
            program.interrupt();
        }
        program.await_line("cut off");
        assert!(program.end().success());
        let ends = running.into_iter().map(rest);
        let cut = ends.filter(|text| !text.contains("data: [DONE]")).count();
        assert!(cut > 0, "{drain}");
    }
}

#[test]
fn quotas_go_to_their_models() {
    let quotas = ["--guarantee", "tiny=64", "--ceiling", "tiny-2=128"];
    let priority = ["--priority", "tiny-2=-3"];
    let program = Program::start(&[&quotas[..], &priority].concat());
    let metrics = rest(program.send("GET", "/metrics", ""));
    for line in [
        r#"cuda_vmm_guarantee_bytes{model="tiny"} 67108864"#,
        r#"cuda_vmm_ceiling_bytes{model="tiny-2"} 134217728"#,
    ] {
        assert!(metrics.contains(line), "{line} is not in {metrics}");
    }
}

#[test]
fn models_sleep_and_wake_over_http() {
    // Of four tiny models, two with sequences have room.
    let names = "a=tiny,b=tiny,c=tiny,d=tiny";
    let arguments = ["--models", names, "--memory", "20", "--sleep-after", "3600"];
    let mut program = Program::start(&arguments);
    let text = |model: &str| {
        let body = format!(
            r#"{{"model": "{model}", "prompt": "Hello", "max_tokens": 4, "temperature": 0}}"#
        );
        let response = rest(program.send("POST", "/v1/completions", &body));
        assert!(response.starts_with("HTTP/1.1 200"), "{response}");
        let start = response.find("\"text\":").expect(&response);
        response[start..].split(',').next().unwrap().to_owned()
    };
    let models = ["a", "b", "c", "d"];
    let first = models.map(text);
    assert_eq!(models.map(text), first);
    for (what, state) in [("sleep", "asleep"), ("sleep", "asleep"), ("wake", "awake")] {
        let path = format!("/v1/models/d/{what}");
        let response = rest(program.send("POST", &path, ""));
        assert!(
            response.contains(&format!("\"state\":\"{state}\"")),
            "{response}"
        );
        let list = rest(program.send("GET", "/v1/models", ""));
        let of_d = list.split("\"id\":\"d\"").nth(1).expect(&list);
        assert!(of_d.contains(&format!("\"state\":\"{state}\"")), "{list}");
        let metrics = rest(program.send("GET", "/metrics", ""));
        let is_asleep = u8::from(state == "asleep");
        let sample = format!("cuda_vmm_serve_asleep{{model=\"d\"}} {is_asleep}\n");
        assert!(metrics.contains(&sample), "{metrics}");
    }
    let response = rest(program.send("POST", "/v1/models/d/sleep", ""));
    assert!(response.starts_with("HTTP/1.1 200"), "{response}");
    let page = rest(program.send("GET", "/", ""));
    assert!(page.contains("(asleep)"), "{page}");
    program.interrupt();
    assert!(program.end().success());
}

#[test]
fn what_cannot_be_served_is_said_at_the_start() {
    let taken = Program::start(&["--models", "tiny"]);
    for (arguments, problem) in [
        (
            &["--listen", &taken.address][..],
            "cannot listen on 127.0.0.1",
        ),
        (&["--guarantee", "big=1"], "there is no model big"),
        (&["--guarantee", "tiny"], "NAME=VALUE is expected"),
        (&["--ceiling", "tiny=x"], "invalid digit"),
        (&["--guarantee", "tiny=300"], "guarantee"),
        (&["--models", "huge"], "huge is no shape"),
        (&["--sleep-after=-1"], "negative"),
        (
            &["--sleeping", "--policy", "static"],
            "models sleep under the policies elastic and page-at-a-time alone",
        ),
        // Not even one model has room.
        (
            &["--sleeping", "--memory", "1"],
            "the models cannot be made",
        ),
        (
            &["--models", "a=tiny,a=tiny"],
            "model already registered: a",
        ),
    ] {
        let mut command = start(arguments);
        if !arguments.contains(&"--listen") {
            command.args(["--listen", "127.0.0.1:0"]);
        }
        let output = command.output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{arguments:?}");
        assert!(text.contains(problem), "{arguments:?}: {text}");
    }
}
