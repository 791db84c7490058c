//! What the network's benchmarks tell, to a person and as JSON.

use std::path::PathBuf;

/// Samples of each figure, by its name.
#[derive(Default)]
pub struct Report(Vec<(String, Vec<f64>)>);

impl Report {
    /// Prints the figure, and keeps it.
    pub fn add(&mut self, name: &str, mut samples: Vec<f64>) {
        samples.sort_by(f64::total_cmp);
        let at = |part: f64| samples[((samples.len() - 1) as f64 * part) as usize];
        println!("{name:<84} p50 {:>9.2}  p99 {:>9.2}  of {}", at(0.5), at(0.99), samples.len());
        self.0.push((name.to_owned(), samples));
    }

    /// Writes the figures to the folder on the command line, if there is one.
    pub fn write(&self, file: &str) {
        let folder = arguments().map(PathBuf::from).find(|path| path.is_dir());
        let Some(folder) = folder else { return };
        let lines: Vec<_> = self.0.iter().map(|(name, samples)| format!("{name:?}: {samples:?}")).collect();
        std::fs::write(folder.join(file), format!("{{{}}}\n", lines.join(",\n"))).unwrap();
    }
}

pub fn arguments() -> impl Iterator<Item = String> {
    std::env::args().skip(1)
}
