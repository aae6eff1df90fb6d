//! A line that shows how far the replay is: live on a terminal, now and then elsewhere.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

const PLAIN_INTERVAL: Duration = Duration::from_secs(5);

/// Progress on standard error, without colours.
pub struct Live {
    output: Output,
    end_ns: u64,
}

enum Output {
    Terminal(ProgressBar),
    Plain { last: Instant },
}

impl Live {
    /// Progress towards `end_ns` of simulated time.
    pub fn new(end_ns: u64) -> Self {
        let output = if std::io::stderr().is_terminal() {
            let bar = ProgressBar::new(end_ns.max(1));
            let style = ProgressStyle::with_template("[{bar:16}] {percent:>3}%  {wide_msg}");
            bar.set_style(
                style
                    .unwrap_or_else(|_| ProgressStyle::default_bar())
                    .progress_chars("=> "),
            );
            Output::Terminal(bar)
        } else {
            Output::Plain {
                last: Instant::now(),
            }
        };
        Self { output, end_ns }
    }

    /// Shows the state at `at_ns` of simulated time; `state` is asked only if it is shown.
    pub fn show(&mut self, at_ns: u64, state: impl FnOnce() -> String) {
        match &mut self.output {
            Output::Terminal(bar) => {
                bar.set_message(state());
                bar.set_position(at_ns.min(self.end_ns));
            }
            Output::Plain { last } if last.elapsed() >= PLAIN_INTERVAL => {
                *last = Instant::now();
                let percent = at_ns.min(self.end_ns) as f64 * 100.0 / self.end_ns.max(1) as f64;
                // Progress is a courtesy: a closed standard error is no reason to stop.
                let _ = writeln!(std::io::stderr(), "{percent:3.0}%  {}", state());
            }
            Output::Plain { .. } => {}
        }
    }

    /// Clears the line.
    pub fn finish(self) {
        if let Output::Terminal(bar) = self.output {
            bar.finish_and_clear();
        }
    }
}
