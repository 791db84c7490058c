//! What image parts are on the node, who is fetching, and what may go.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use futures::FutureExt;
use futures::future::{BoxFuture, WeakShared};

use super::fetch::{BlobSource, FetchError, fetch};
use crate::clock::unix_ns;
use crate::ids::Digest;
use crate::wanted::Part;

type Fetching = WeakShared<BoxFuture<'static, Result<(), FetchError>>>;

/// The folder of image parts.
pub struct ImageCache {
    folder: PathBuf,
    /// Bytes that unused parts may take before the least recently used go.
    bound: u64,
    source: Arc<dyn BlobSource>,
    /// Downloads under way. Weak: a download that nobody waits for any more stops (and its partial
    /// file lets the next one go on).
    fetching: Mutex<HashMap<Digest, Fetching>>,
}

/// A part that is here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cached {
    pub path: PathBuf,
    /// It was here already.
    pub hit: bool,
    /// When it was asked for and when it was there, nanoseconds since 1970.
    pub asked_unix_ns: u64,
    pub ready_unix_ns: u64,
}

impl ImageCache {
    pub fn new(folder: PathBuf, bound: u64, source: Arc<dyn BlobSource>) -> Self {
        Self { folder, bound, source, fetching: Mutex::default() }
    }

    /// The part's file; fetched first if it is not here. Several callers share one download. May be
    /// dropped at any time.
    pub async fn get(&self, part: &Part) -> Result<Cached, FetchError> {
        let asked_unix_ns = unix_ns();
        let path = self.folder.join(part.sha256.as_str());
        let hit = self.is_here(part, &path)?;
        if !hit {
            self.download(part, &path).await?;
        }
        touch(&path);
        Ok(Cached { path, hit, asked_unix_ns, ready_unix_ns: unix_ns() })
    }

    fn is_here(&self, part: &Part, path: &Path) -> Result<bool, FetchError> {
        match fs::metadata(path) {
            Ok(found) if found.len() == part.size => Ok(true),
            // What lies here has this digest, so the size that was registered is wrong.
            Ok(found) => {
                Err(FetchError::WrongSize { digest: part.sha256.clone(), wanted: part.size, got: found.len() })
            }
            Err(_) => Ok(false),
        }
    }

    async fn download(&self, part: &Part, target: &Path) -> Result<(), FetchError> {
        let download = {
            let mut fetching = self.fetching.lock().unwrap_or_else(PoisonError::into_inner);
            fetching.retain(|_, download| download.upgrade().is_some());
            match fetching.get(&part.sha256).and_then(WeakShared::upgrade) {
                Some(download) => download,
                None => {
                    let (source, part, target) = (Arc::clone(&self.source), part.clone(), target.to_owned());
                    let partial = self.folder.join("partial").join(part.sha256.as_str());
                    let digest = part.sha256.clone();
                    let download =
                        async move { fetch(source.as_ref(), &part, &partial, &target).await }.boxed().shared();
                    if let Some(weak) = download.downgrade() {
                        fetching.insert(digest, weak);
                    }
                    download
                }
            }
        };
        download.await
    }

    /// Removes the least recently used parts that are not in `needed`, until the unneeded ones fit
    /// the bound. Returns how many bytes went.
    pub fn collect(&self, needed: &HashSet<Digest>) -> io::Result<u64> {
        let mut unused: Vec<(SystemTime, u64, PathBuf)> = Vec::new();
        for folder in [self.folder.clone(), self.folder.join("partial")] {
            for entry in fs::read_dir(folder)? {
                let entry = entry?;
                let Some(digest) = entry.file_name().to_str().and_then(|name| name.parse::<Digest>().ok()) else {
                    continue;
                };
                let found = entry.metadata()?;
                if !needed.contains(&digest) && !self.is_fetching(&digest) {
                    unused.push((found.modified()?, found.len(), entry.path()));
                }
            }
        }
        unused.sort();
        let mut total: u64 = unused.iter().map(|(_, size, _)| size).sum();
        let mut freed = 0;
        for (_, size, path) in unused {
            if total <= self.bound {
                break;
            }
            fs::remove_file(&path)?;
            tracing::info!(path = %path.display(), size, "image part removed: no instance needs it and the cache is over its bound");
            total -= size;
            freed += size;
        }
        Ok(freed)
    }

    fn is_fetching(&self, digest: &Digest) -> bool {
        let fetching = self.fetching.lock().unwrap_or_else(PoisonError::into_inner);
        fetching.get(digest).is_some_and(|download| download.upgrade().is_some())
    }
}

/// Notes the use of a part for the order of removal; a failure costs only that order.
fn touch(path: &Path) {
    if let Ok(file) = fs::File::open(path) {
        let _ = file.set_modified(SystemTime::now());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::images::fetch::SourceError;
    use futures::StreamExt;
    use futures::stream::BoxStream;
    use proptest::prelude::*;
    use sha2::{Digest as _, Sha256};
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// Serves `bytes` in small chunks; the n-th reading breaks off after `breaks[n]` bytes.
    struct Bytes {
        bytes: Vec<u8>,
        breaks: Mutex<Vec<usize>>,
        readings: AtomicUsize,
        served: AtomicUsize,
    }

    impl Bytes {
        fn new(bytes: &[u8], breaks: &[usize]) -> Arc<Self> {
            let breaks = Mutex::new(breaks.iter().rev().copied().collect());
            Arc::new(Self { bytes: bytes.to_vec(), breaks, readings: AtomicUsize::new(0), served: AtomicUsize::new(0) })
        }
    }

    struct Source(Arc<Bytes>);

    impl BlobSource for Source {
        fn read(&self, _: &Digest, offset: u64) -> BoxStream<'static, Result<Vec<u8>, SourceError>> {
            self.0.readings.fetch_add(1, Ordering::SeqCst);
            let rest = &self.0.bytes[(offset as usize).min(self.0.bytes.len())..];
            let stop = self.0.breaks.lock().unwrap().pop();
            let rest = &rest[..stop.unwrap_or(rest.len()).min(rest.len())];
            self.0.served.fetch_add(rest.len(), Ordering::SeqCst);
            let mut items: Vec<_> = rest.chunks(7).map(|chunk| Ok(chunk.to_vec())).collect();
            if stop.is_some() {
                items.push(Err(SourceError::Interrupted("cut".into())));
            }
            // Yields in between, so that several downloads would interleave if there were several.
            futures::stream::iter(items)
                .then(|item| async {
                    tokio::task::yield_now().await;
                    item
                })
                .boxed()
        }
    }

    fn part_of(bytes: &[u8]) -> Part {
        Part { sha256: Digest::of(Sha256::new().chain_update(bytes)), size: bytes.len() as u64 }
    }

    fn cache(source: &Arc<Bytes>) -> (tempfile::TempDir, Arc<ImageCache>) {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("partial")).unwrap();
        let cache = ImageCache::new(folder.path().to_owned(), 0, Arc::new(Source(Arc::clone(source))));
        (folder, Arc::new(cache))
    }

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().unwrap()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn interrupted_downloads_go_on_and_end_with_the_same_bytes(
            bytes in proptest::collection::vec(any::<u8>(), 0..300),
            breaks in proptest::collection::vec(0usize..120, 0..5),
        ) {
            let source = Bytes::new(&bytes, &breaks);
            let (_folder, cache) = cache(&source);
            let part = part_of(&bytes);
            runtime().block_on(async {
                for _ in 0..=breaks.len() {
                    match cache.get(&part).await {
                        Ok(cached) => {
                            assert_eq!(fs::read(cached.path).unwrap(), bytes);
                            assert_eq!(source.served.load(Ordering::SeqCst), bytes.len(), "no byte is fetched twice");
                            return;
                        }
                        Err(error) => assert!(!error.is_permanent(), "{error}"),
                    }
                }
                panic!("not here after every interruption was used up");
            });
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn many_who_want_it_share_one_download() {
        let source = Bytes::new(&[7; 5000], &[]);
        let (_folder, cache) = cache(&source);
        let part = part_of(&[7; 5000]);
        let all = (0..20).map(|_| {
            let (cache, part) = (Arc::clone(&cache), part.clone());
            tokio::spawn(async move { cache.get(&part).await.unwrap() })
        });
        futures::future::join_all(all).await.into_iter().for_each(|cached| assert!(cached.is_ok()));
        assert_eq!(source.served.load(Ordering::SeqCst), 5000);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn wrong_bytes_are_refused_and_nothing_is_kept() {
        let source = Bytes::new(b"wrong bytes", &[]);
        let (folder, cache) = cache(&source);
        let part = part_of(b"right bytes");
        let error = cache.get(&part).await.unwrap_err();
        assert!(matches!(error, FetchError::WrongDigest { .. }), "{error}");
        assert!(!folder.path().join(part.sha256.as_str()).exists());
        assert_eq!(fs::read_dir(folder.path().join("partial")).unwrap().count(), 0);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_damaged_partial_file_is_not_the_images_fault() {
        let source = Bytes::new(b"right bytes", &[]);
        let (folder, cache) = cache(&source);
        let part = part_of(b"right bytes");
        fs::write(folder.path().join("partial").join(part.sha256.as_str()), b"wrong").unwrap();
        let cached = cache.get(&part).await.unwrap();
        assert_eq!(fs::read(cached.path).unwrap(), b"right bytes");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn too_many_bytes_are_refused() {
        let source = Bytes::new(b"right bytes and more", &[]);
        let (_folder, cache) = cache(&source);
        let error = cache.get(&part_of(b"right bytes")).await.unwrap_err();
        assert!(matches!(error, FetchError::WrongSize { .. }), "{error}");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn only_what_nobody_needs_is_collected() {
        let source = Bytes::new(b"abc", &[]);
        let (_folder, cache) = cache(&source);
        let part = part_of(b"abc");
        let path = cache.get(&part).await.unwrap().path;
        assert_eq!(cache.collect(&[part.sha256.clone()].into()).unwrap(), 0);
        assert!(path.exists());
        assert_eq!(cache.collect(&HashSet::new()).unwrap(), 3);
        assert!(!path.exists());
    }
}
