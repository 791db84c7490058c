//! Where the VM can be watched: serial port, log, metrics.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// `PUT /serial`. Without it the guest's serial port is the process's standard input and output.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Serial {
    pub serial_out_path: PathBuf,
    /// Our own: when the file has grown to this many bytes it is renamed to `….1` (replacing an
    /// older one) and begun anew, so that a guest cannot fill the host's disk. Unset: 1 MiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size_limit: Option<u64>,
}

/// `PUT /metrics`: where a JSON line is written at each FlushMetrics action and every 60 s.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Metrics {
    /// A file (made if it is not there) or a fifo.
    pub metrics_path: PathBuf,
}

/// `PUT /logger`. What is not given stays as it is.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Logger {
    /// A file (made if it is not there) or a fifo; standard error until it is given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log_path: Option<PathBuf>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub level: Option<LogLevel>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub show_level: Option<bool>,
    /// File and line that a message comes from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub show_log_origin: Option<bool>,
    /// Only messages of this module and those below it, such as `mallee_vmm::devices`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub module: Option<String>,
}

/// Firecracker's names and their usual spellings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub enum LogLevel {
    #[serde(alias = "OFF", alias = "off")]
    Off,
    #[serde(alias = "ERROR", alias = "error")]
    Error,
    #[serde(alias = "WARN", alias = "WARNING", alias = "Warn", alias = "warn", alias = "warning")]
    Warning,
    #[serde(alias = "INFO", alias = "info")]
    Info,
    #[serde(alias = "DEBUG", alias = "debug")]
    Debug,
    #[serde(alias = "TRACE", alias = "trace")]
    Trace,
}
