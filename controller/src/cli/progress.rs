//! What is shown while a step takes longer than a moment.

use std::io::IsTerminal as _;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// A step under way: a line that moves on a terminal, one line at its end elsewhere.
pub struct Step {
    bar: ProgressBar,
    text: String,
    begun: Instant,
}

impl Step {
    pub fn begin(text: &str) -> Step {
        let bar = if std::io::stderr().is_terminal() { ProgressBar::new_spinner() } else { ProgressBar::hidden() };
        // The template is a constant; without it the bar's own default is used.
        if let Ok(style) = ProgressStyle::with_template("  {spinner} {msg} {elapsed}") {
            bar.set_style(style);
        }
        bar.set_message(text.to_owned());
        bar.enable_steady_tick(Duration::from_millis(120));
        Step { bar, text: text.to_owned(), begun: Instant::now() }
    }

    pub fn end(self, result: &str) {
        self.bar.finish_and_clear();
        let result = if result.is_empty() { String::new() } else { format!("  {result}") };
        eprintln!("  ✓ {:<44} {:>6.1} s{result}", self.text, self.begun.elapsed().as_secs_f64());
    }

    pub fn fail(self) {
        self.bar.finish_and_clear();
        eprintln!("  ✗ {:<44} {:>6.1} s", self.text, self.begun.elapsed().as_secs_f64());
    }
}
