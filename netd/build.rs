//! Generates the gRPC types and service of `proto/network.proto`.

fn main() -> std::io::Result<()> {
    println!("cargo:rerun-if-changed=proto");
    tonic_prost_build::configure().compile_protos(&["proto/network.proto"], &["proto"])
}
