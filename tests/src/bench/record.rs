//! What one benchmark found: its series, as JSON for programs and as a table for people.

use std::{collections::BTreeMap, fs, path::Path};

use serde::Serialize;

use super::{error::BenchError, facts::Facts, monitors::OURS};

#[derive(Debug, Serialize)]
pub struct Record {
    pub benchmark: &'static str,
    /// What was measured, in words.
    pub what: &'static str,
    pub machine: Facts,
    pub series: Vec<Series>,
    /// Median of each series over the median of `mallee-vmm`'s.
    pub ratios: BTreeMap<String, f64>,
    /// Monitor to why it has no series.
    pub left_out: BTreeMap<String, String>,
}

/// Samples of one thing, in the order in which they were taken.
#[derive(Debug, Serialize)]
pub struct Series {
    pub name: String,
    pub version: String,
    pub unit: &'static str,
    pub median: f64,
    pub least: f64,
    pub most: f64,
    pub samples: Vec<f64>,
}

impl Series {
    /// None without samples.
    pub fn of(name: &str, version: &str, unit: &'static str, samples: Vec<f64>) -> Option<Series> {
        let mut sorted = samples.clone();
        sorted.sort_by(f64::total_cmp);
        Some(Series {
            name: name.to_owned(),
            version: version.to_owned(),
            unit,
            median: median(&sorted)?,
            least: *sorted.first()?,
            most: *sorted.last()?,
            samples,
        })
    }
}

fn median(sorted: &[f64]) -> Option<f64> {
    let middle = sorted.len() / 2;
    let upper = *sorted.get(middle)?;
    if sorted.len() % 2 == 1 { Some(upper) } else { Some((sorted[middle - 1] + upper) / 2.0) }
}

impl Record {
    pub fn new(
        benchmark: &'static str,
        what: &'static str,
        machine: Facts,
        series: Vec<Series>,
        left_out: BTreeMap<String, String>,
    ) -> Record {
        let ours = series.iter().find(|one| one.name == OURS).map(|one| one.median);
        let ratios = series
            .iter()
            .filter(|one| one.name != OURS)
            .filter_map(|one| Some((one.name.clone(), one.median / ours?)))
            .collect();
        Record { benchmark, what, machine, series, ratios, left_out }
    }

    /// Writes `FOLDER/BENCHMARK.json`.
    pub fn write(&self, folder: &Path) -> Result<(), BenchError> {
        let path = folder.join(format!("{}.json", self.benchmark));
        serde_json::to_vec_pretty(self)
            .map_err(std::io::Error::other)
            .and_then(|text| fs::create_dir_all(folder).and_then(|()| fs::write(&path, text)))
            .map_err(|source| BenchError::File { action: "writing", path, source })
    }

    pub fn print(&self) {
        println!("\n{} ({}, KVM {})", self.what, self.machine.processor, self.machine.kvm["class"]);
        println!("  {:<28} {:>10} {:>10} {:>10}  {:>6}", "", "median", "least", "most", "ratio");
        for one in &self.series {
            let ratio = self.ratios.get(&one.name).map_or(String::new(), |ratio| format!("{ratio:.2}"));
            println!(
                "  {:<28} {:>10.2} {:>10.2} {:>10.2}  {ratio:>6}  {}, {} runs, {}",
                one.name,
                one.median,
                one.least,
                one.most,
                one.unit,
                one.samples.len(),
                one.version
            );
        }
        for (monitor, reason) in &self.left_out {
            println!("  {monitor}: left out, {reason}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_or_the_mean_of_the_two() {
        assert_eq!(Series::of("a", "", "ms", vec![3.0, 1.0, 2.0]).unwrap().median, 2.0);
        assert_eq!(Series::of("a", "", "ms", vec![4.0, 1.0, 2.0, 3.0]).unwrap().median, 2.5);
        assert!(Series::of("a", "", "ms", vec![]).is_none());
    }
}
