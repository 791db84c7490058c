//! The log: `tracing` on standard error until `PUT /logger` says otherwise.
//!
//! Filter and output can be replaced while the program runs; messages are formatted by
//! `tracing-subscriber`. A log that cannot be written (a full fifo) loses lines and never holds up the VM.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::registry::Registry;
use tracing_subscriber::reload;
use tracing_subscriber::util::SubscriberInitExt;

use crate::api::{LogLevel, Logger};
use crate::error::{Error, Result};
use crate::metrics::PROCESS;

type Output = Box<dyn Layer<Registry> + Send + Sync>;
type Outputs = reload::Layer<Output, Registry>;
type Filtered = tracing_subscriber::layer::Layered<Outputs, Registry>;

/// The process's log.
pub struct Log {
    output: reload::Handle<Output, Registry>,
    filter: reload::Handle<Targets, Filtered>,
    settings: Settings,
}

#[derive(Clone)]
struct Settings {
    level: LevelFilter,
    module: Option<String>,
    file: Option<Arc<File>>,
    show_level: bool,
    show_origin: bool,
}

impl Log {
    /// Logs to standard error from now on.
    pub fn start(level: tracing::Level) -> Self {
        let settings = Settings { level: level.into(), module: None, file: None, show_level: true, show_origin: false };
        let (output, output_handle) = reload::Layer::new(settings.output());
        let (filter, filter_handle) = reload::Layer::new(settings.filter());
        // A library that had set its own subscriber before would keep it; the program is the first.
        let _ = tracing_subscriber::registry().with(output).with(filter).try_init();
        Log { output: output_handle, filter: filter_handle, settings }
    }

    /// Does what `PUT /logger` asks for; an error changes nothing.
    pub fn configure(&mut self, logger: &Logger) -> Result<()> {
        let mut settings = self.settings.clone();
        if let Some(path) = &logger.log_path {
            settings.file = Some(Arc::new(open(path)?));
        }
        if let Some(level) = logger.level {
            settings.level = filter_of(level);
        }
        if let Some(module) = &logger.module {
            settings.module = Some(module.clone());
        }
        settings.show_level = logger.show_level.unwrap_or(settings.show_level);
        settings.show_origin = logger.show_log_origin.unwrap_or(settings.show_origin);
        let failed = |error: reload::Error| Error::Host { what: "log", source: io::Error::other(error) };
        self.output.reload(settings.output()).map_err(failed)?;
        self.filter.reload(settings.filter()).map_err(failed)?;
        self.settings = settings;
        Ok(())
    }
}

impl Settings {
    fn output(&self) -> Output {
        let layer = tracing_subscriber::fmt::layer()
            .with_level(self.show_level)
            .with_file(self.show_origin)
            .with_line_number(self.show_origin)
            .with_thread_names(true);
        match &self.file {
            None => layer.with_writer(io::stderr).boxed(),
            Some(file) => {
                let file = file.clone();
                layer.with_ansi(false).with_writer(move || Lossy(file.clone())).boxed()
            }
        }
    }

    fn filter(&self) -> Targets {
        match &self.module {
            None => Targets::new().with_default(self.level),
            Some(module) => Targets::new().with_target(module.clone(), self.level),
        }
    }
}

fn filter_of(level: LogLevel) -> LevelFilter {
    match level {
        LogLevel::Off => LevelFilter::OFF,
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warning => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Trace => LevelFilter::TRACE,
    }
}

/// For reading too, so that a fifo without a reader is no error and no wait.
fn open(path: &Path) -> Result<File> {
    OpenOptions::new()
        .read(true)
        .append(true)
        .create(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(path)
        .map_err(Error::file("log", path))
}

/// A file whose lines may be lost, which is counted.
struct Lossy(Arc<File>);

impl Write for Lossy {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if (&*self.0).write(line).is_err() {
            PROCESS.missed_logs.increment();
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
