//! A trace as text: one line a span, earliest first, a bar where it lies in the whole.
//!
//! A moment (a span without length) is a mark, a stretch a bar of at least one cell; numbers are
//! milliseconds since the trace's first span began.

use std::os::fd::AsFd as _;

use crate::traces::{Span, Trace};

/// Cells of the bar when the terminal says nothing of its width.
const DEFAULT_WIDTH: usize = 110;
const SMALLEST_BAR: usize = 16;

/// Columns of the terminal on standard output.
pub fn width_of_terminal() -> usize {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    let stdout = std::io::stdout();
    // SAFETY: TIOCGWINSZ writes one `winsize` to the given address, which is that of a live one.
    let done =
        unsafe { libc::ioctl(std::os::fd::AsRawFd::as_raw_fd(&stdout.as_fd()), libc::TIOCGWINSZ, &raw mut size) };
    if done == 0 && size.ws_col > 0 { usize::from(size.ws_col) } else { DEFAULT_WIDTH }
}

/// The whole picture, `width` columns wide where that is possible.
pub fn draw(trace: &Trace, width: usize) -> String {
    let mut spans: Vec<&Span> = trace.spans.iter().collect();
    spans.sort_by_key(|span| (span.start_unix_ns, std::cmp::Reverse(span.end_unix_ns)));
    let (Some(first), Some(end)) =
        (spans.first(), spans.iter().map(|span| span.end_unix_ns.max(span.start_unix_ns)).max())
    else {
        return format!("trace {}: no spans\n", trace.id);
    };
    let whole = Whole { begin: first.start_unix_ns, length: (end - first.start_unix_ns).max(1) };
    let part = widest(&spans, |span| &span.part);
    let name = widest(&spans, |span| &span.name);
    // Two blanks between columns; a start and a length of ten columns each.
    let bar = width.saturating_sub(part + name + 2 * 4 + 20 + 1).max(SMALLEST_BAR);
    let mut picture = format!("trace {}   {} ms in all\n", trace.id, milliseconds(whole.length));
    picture.push_str(&format!("{:part$}  {:name$}  {:>10}  {:>10}\n", "part", "what", "at ms", "took ms"));
    for span in spans {
        picture.push_str(&format!(
            "{:part$}  {:name$}  {:>10}  {:>10}  {}\n",
            span.part,
            span.name,
            milliseconds(span.start_unix_ns - whole.begin),
            took(span),
            whole.bar(span, bar),
        ));
    }
    picture
}

/// The stretch that the picture covers.
struct Whole {
    begin: u64,
    /// At least one nanosecond.
    length: u64,
}

impl Whole {
    /// The span's cells among `cells`, without blanks at the end.
    fn bar(&self, span: &Span, cells: usize) -> String {
        let cell = |ns: u64| ((u128::from(ns - self.begin) * cells as u128) / u128::from(self.length)) as usize;
        let from = cell(span.start_unix_ns).min(cells - 1);
        if span.end_unix_ns <= span.start_unix_ns {
            return format!("{}◆", " ".repeat(from));
        }
        let to = cell(span.end_unix_ns).clamp(from + 1, cells);
        format!("{}{}", " ".repeat(from), "█".repeat(to - from))
    }
}

fn widest(spans: &[&Span], text: impl Fn(&Span) -> &String) -> usize {
    spans.iter().map(|span| text(span).chars().count()).max().unwrap_or(0).max(4)
}

fn took(span: &Span) -> String {
    match span.end_unix_ns.checked_sub(span.start_unix_ns) {
        Some(0) | None => "·".to_owned(),
        Some(length) => milliseconds(length),
    }
}

fn milliseconds(ns: u64) -> String {
    let whole = ns / 1_000_000;
    // Three digits below a millisecond only where they tell something.
    if whole >= 1000 { whole.to_string() } else { format!("{:.3}", ns as f64 / 1e6) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn span(part: &str, name: &str, start_ms: u64, end_ms: u64) -> Span {
        Span { part: part.into(), ..Span::here("t", name, 0, "") }.at(start_ms, end_ms)
    }

    trait At {
        fn at(self, start_ms: u64, end_ms: u64) -> Self;
    }

    impl At for Span {
        fn at(mut self, start_ms: u64, end_ms: u64) -> Span {
            self.start_unix_ns = 1_000_000_000_000 + start_ms * 1_000_000;
            self.end_unix_ns = 1_000_000_000_000 + end_ms * 1_000_000;
            self
        }
    }

    fn trace(spans: Vec<Span>) -> Trace {
        Trace { id: "t".into(), spans }
    }

    #[test]
    fn a_picture() {
        let picture = draw(
            &trace(vec![
                span("agent", "disk", 25, 50),
                span("controller", "commit", 0, 25),
                span("guest", "init", 100, 100),
            ]),
            10 + 6 + 8 + 20 + 1 + 16,
        );
        let expected = "\
trace t   100.000 ms in all
part        what         at ms     took ms
controller  commit       0.000      25.000  ████
agent       disk        25.000      25.000      ████
guest       init       100.000           ·                 ◆
";
        assert_eq!(picture, expected);
    }

    #[test]
    fn nothing_and_one_moment() {
        assert_eq!(draw(&trace(vec![]), 80), "trace t: no spans\n");
        let picture = draw(&trace(vec![span("vmm", "first run", 3, 3)]), 80);
        assert!(picture.lines().nth(2).unwrap().ends_with('◆'), "{picture}");
    }

    #[test]
    fn long_times_have_no_fraction() {
        assert_eq!(milliseconds(999_999), "1.000");
        assert_eq!(milliseconds(12_345_678_901), "12345");
    }

    proptest! {
        /// Whatever the spans are, also with ends before starts: a line each, every bar inside.
        #[test]
        fn every_span_has_one_line_within_the_width(
            times in prop::collection::vec((0_u64..10_000, 0_u64..10_000), 1..20),
            width in 0_usize..200,
        ) {
            let spans: Vec<Span> = times.iter().map(|(a, b)| span("agent", "x", *a, *b)).collect();
            let picture = draw(&trace(spans), width);
            prop_assert_eq!(picture.lines().count(), times.len() + 2);
            let widest = picture.lines().map(|line| line.chars().count()).max().unwrap();
            prop_assert!(widest <= width.max(5 + 4 + 8 + 20 + SMALLEST_BAR), "{} {}", widest, picture);
        }
    }
}
