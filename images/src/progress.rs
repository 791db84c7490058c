//! What is being done, shown while it is done: a spinner on a terminal, plain lines elsewhere.

use std::io::{IsTerminal, stderr};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// One step. It is shown until it is dropped, and then with the time it took.
pub struct Step {
    what: String,
    began: Instant,
    spinner: Option<ProgressBar>,
}

impl Step {
    pub fn begin(what: impl Into<String>) -> Self {
        let what = what.into();
        let spinner = stderr().is_terminal().then(|| spinner(&what));
        if spinner.is_none() {
            eprintln!("{what} …");
        }
        Step { what, began: Instant::now(), spinner }
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        let took = self.began.elapsed();
        if let Some(spinner) = &self.spinner {
            spinner.finish_with_message(format!("{} ({:.1} s)", self.what, took.as_secs_f64()));
        } else if took > Duration::from_secs(1) {
            eprintln!("{}: {:.1} s", self.what, took.as_secs_f64());
        }
    }
}

fn spinner(what: &str) -> ProgressBar {
    let spinner = ProgressBar::new_spinner().with_message(what.to_owned());
    if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} {elapsed}") {
        spinner.set_style(style);
    }
    spinner.enable_steady_tick(Duration::from_millis(120));
    spinner
}
