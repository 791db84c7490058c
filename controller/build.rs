//! Makes typed Rust out of the service models in `model/`: see `codegen/mod.rs`.

#[path = "codegen/mod.rs"]
mod codegen;

use std::path::{Path, PathBuf};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=codegen");
    println!("cargo:rerun-if-changed=migrations");
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    for service in ["ec2", "sts"] {
        let source = Path::new("model").join(format!("{service}.json"));
        println!("cargo:rerun-if-changed={}", source.display());
        let model: codegen::model::Model = serde_json::from_str(&std::fs::read_to_string(&source)?)
            .map_err(|error| format!("{}: {error}", source.display()))?;
        let code = codegen::generate(&model).map_err(|error| format!("{}: {error}", source.display()))?;
        std::fs::write(out.join(format!("{service}.rs")), code)?;
    }
    Ok(())
}
