//! Link arguments of the freestanding guest. They apply to the program only: the library and its
//! tests are linked as usual for the host.

fn main() {
    let folder = std::env::var("CARGO_MANIFEST_DIR").expect("cargo sets it for every build script");
    println!("cargo:rerun-if-changed=probe.ld");
    for argument in [
        // No C runtime, no libraries, a fixed place in physical memory.
        "-nostartfiles",
        "-nostdlib",
        "-static",
        "-no-pie",
        "-Wl,--build-id=none",
        "-Wl,-z,max-page-size=4096",
        "-Wl,-z,norelro",
    ] {
        println!("cargo:rustc-link-arg-bins={argument}");
    }
    println!("cargo:rustc-link-arg-bins=-Wl,-T,{folder}/probe.ld");
}
