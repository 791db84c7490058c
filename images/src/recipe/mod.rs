//! The images that can be built, each in a file of its own.

pub mod probe;
pub mod tiny;

use std::path::PathBuf;

use crate::cache::Cache;
use crate::error::Error;
use crate::guest_program::Source;

/// What every recipe is given.
pub struct Kitchen {
    pub cache: Cache,
    pub source: Source,
    pub options: Options,
}

/// What the caller may choose.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options {
    /// Keep the distribution's compressed `bzImage` instead of the ELF image inside it.
    pub bzimage: bool,
}

/// An image that can be built.
pub struct Recipe {
    pub name: &'static str,
    pub about: &'static str,
    /// Returns the folder in the cache that holds the image.
    pub build: fn(&Kitchen) -> Result<PathBuf, Error>,
}

pub const ALL: [Recipe; 2] = [
    Recipe { name: "tiny", about: tiny::ABOUT, build: tiny::build },
    Recipe { name: "probe", about: probe::ABOUT, build: probe::build },
];

/// The recipe of this name.
pub fn find(name: &str) -> Result<&'static Recipe, Error> {
    static RECIPES: [Recipe; 2] = ALL;
    RECIPES.iter().find(|recipe| recipe.name == name).ok_or_else(|| Error::UnknownImage {
        name: name.to_owned(),
        known: RECIPES.iter().map(|recipe| recipe.name).collect::<Vec<_>>().join(", "),
    })
}
