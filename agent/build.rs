//! Generates the gRPC types and service of `proto/node.proto`; the network's messages in it are
//! netd's own types, not a second copy.

fn main() -> std::io::Result<()> {
    println!("cargo:rerun-if-changed=proto");
    println!("cargo:rerun-if-changed=../netd/proto");
    tonic_prost_build::configure()
        .extern_path(".mallee.netd.v1", "::mallee_netd::api")
        .compile_protos(&["proto/node.proto"], &["proto", "../netd/proto"])
}
