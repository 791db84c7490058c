//! `mallee-images`: builds images, lists them and checks built ones.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use mallee_images::cache::{self, Cache};
use mallee_images::guest_program::Source;
use mallee_images::manifest::Manifest;
use mallee_images::recipe::{self, Kitchen, Options};
use mallee_images::{Error, manifest};

/// Builds Mallee's bootable images.
#[derive(Parser)]
#[command(version, about)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Builds an image, or takes it from the cache if nothing that goes into it has changed.
    Build {
        /// See `list`.
        name: String,
        /// The folder that gets the manifest and the image's parts.
        #[arg(long)]
        out: PathBuf,
        /// Keep Debian's compressed bzImage instead of the ELF image inside it.
        #[arg(long)]
        bzimage: bool,
        /// Where fetched packages and built images are kept [default: mallee in the user's cache folder].
        #[arg(long, env = "MALLEE_CACHE")]
        cache: Option<PathBuf>,
        /// The source tree with the guests' own programs [default: the one this program was built from].
        #[arg(long, env = "MALLEE_SOURCE")]
        source: Option<PathBuf>,
    },
    /// Lists the images that can be built.
    List,
    /// Compares the files of a built image with its manifest.
    Check {
        /// The folder with the manifest.
        folder: PathBuf,
    },
}

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_env_filter(tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "warn".into()))
        .init();
    match run(Arguments::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mallee-images: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<(), Error> {
    match command {
        Command::Build { name, out, bzimage, cache, source } => {
            let recipe = recipe::find(&name)?;
            let kitchen =
                Kitchen { cache: Cache::open(cache)?, source: Source::find(source)?, options: Options { bzimage } };
            let built = (recipe.build)(&kitchen)?;
            cache::export(&built, &out)?;
            println!("{}", out.join(manifest::FILE).display());
            Ok(())
        }
        Command::List => {
            for recipe in recipe::ALL {
                println!("{:8} {}", recipe.name, recipe.about);
            }
            Ok(())
        }
        Command::Check { folder } => {
            let manifest = Manifest::read(&folder)?;
            manifest.verify(&folder)?;
            println!("{}: {} files as the manifest says", manifest.name, manifest.parts().len());
            Ok(())
        }
    }
}
