//! Checksums of object bytes: which one a client stated, and whether it is right.
//!
//! A client may state a checksum in a header, in a trailer after the bytes (what today's SDKs do),
//! or only name an algorithm. `s3s` hands all of them over and compares none; that is done here.
//! Source: S3 User Guide, "Checking object integrity".

use base64::prelude::{BASE64_STANDARD, Engine as _};
use http::HeaderMap;
use s3s::checksum::ChecksumHasher;
use s3s::crypto::{Checksum as _, Crc32, Crc32c, Crc64Nvme, Sha1, Sha256};
use s3s::{S3Error, S3Result, s3_error};
use serde::{Deserialize, Serialize};

/// The algorithms of `x-amz-checksum-…`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Algorithm {
    Crc32,
    Crc32c,
    Crc64Nvme,
    Sha1,
    Sha256,
}

impl Algorithm {
    pub const ALL: [Algorithm; 5] =
        [Algorithm::Crc32, Algorithm::Crc32c, Algorithm::Crc64Nvme, Algorithm::Sha1, Algorithm::Sha256];

    /// Name as in `x-amz-checksum-algorithm`.
    pub fn name(self) -> &'static str {
        match self {
            Algorithm::Crc32 => "CRC32",
            Algorithm::Crc32c => "CRC32C",
            Algorithm::Crc64Nvme => "CRC64NVME",
            Algorithm::Sha1 => "SHA1",
            Algorithm::Sha256 => "SHA256",
        }
    }

    pub fn parse(name: &str) -> S3Result<Algorithm> {
        Algorithm::ALL.into_iter().find(|a| a.name().eq_ignore_ascii_case(name)).ok_or_else(|| {
            s3_error!(
                InvalidRequest,
                "checksum algorithm {name:?} is unknown: CRC32, CRC32C, CRC64NVME, SHA1 or SHA256"
            )
        })
    }

    /// Name of the header and trailer that carries it.
    pub fn header(self) -> &'static str {
        match self {
            Algorithm::Crc32 => "x-amz-checksum-crc32",
            Algorithm::Crc32c => "x-amz-checksum-crc32c",
            Algorithm::Crc64Nvme => "x-amz-checksum-crc64nvme",
            Algorithm::Sha1 => "x-amz-checksum-sha1",
            Algorithm::Sha256 => "x-amz-checksum-sha256",
        }
    }

    /// Bytes of a value.
    fn width(self) -> usize {
        match self {
            Algorithm::Crc32 | Algorithm::Crc32c => 4,
            Algorithm::Crc64Nvme => 8,
            Algorithm::Sha1 => 20,
            Algorithm::Sha256 => 32,
        }
    }

    /// A hasher of this algorithm alone.
    pub fn hasher(self) -> ChecksumHasher {
        let mut hasher = ChecksumHasher::default();
        match self {
            Algorithm::Crc32 => hasher.crc32 = Some(Crc32::new()),
            Algorithm::Crc32c => hasher.crc32c = Some(Crc32c::new()),
            Algorithm::Crc64Nvme => hasher.crc64nvme = Some(Crc64Nvme::new()),
            Algorithm::Sha1 => hasher.sha1 = Some(Sha1::new()),
            Algorithm::Sha256 => hasher.sha256 = Some(Sha256::new()),
        }
        hasher
    }
}

/// A checksum of stored bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checksum {
    pub algorithm: Algorithm,
    /// Base 64; of a multipart upload's parts with `-<count>` after it when `full_object` is false.
    pub value: String,
    pub full_object: bool,
}

impl Checksum {
    /// The hasher's one result.
    pub fn finish(algorithm: Algorithm, hasher: ChecksumHasher) -> Checksum {
        let sums = hasher.finalize();
        let value = match algorithm {
            Algorithm::Crc32 => sums.checksum_crc32,
            Algorithm::Crc32c => sums.checksum_crc32c,
            Algorithm::Crc64Nvme => sums.checksum_crc64nvme,
            Algorithm::Sha1 => sums.checksum_sha1,
            Algorithm::Sha256 => sums.checksum_sha256,
        };
        Checksum { algorithm, value: value.unwrap_or_default(), full_object: true }
    }

    /// The checksum of the parts' checksums, as a multipart upload of type `COMPOSITE` has it.
    pub fn composite(algorithm: Algorithm, parts: &[Checksum]) -> S3Result<Checksum> {
        let mut hasher = algorithm.hasher();
        for part in parts {
            hasher.update(&decode(algorithm, &part.value)?);
        }
        let whole = Checksum::finish(algorithm, hasher);
        Ok(Checksum { value: format!("{}-{}", whole.value, parts.len()), full_object: false, ..whole })
    }

    /// The value if it is of `algorithm`: for the reply's five members.
    pub fn of(checksum: Option<&Checksum>, algorithm: Algorithm) -> Option<String> {
        checksum.filter(|c| c.algorithm == algorithm).map(|c| c.value.clone())
    }
}

/// What the client says of the bytes that it sends.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stated {
    /// Raw bytes of `Content-MD5`.
    pub md5: Option<[u8; 16]>,
    /// The algorithm it named, with the value unless that comes in a trailer.
    pub checksum: Option<(Algorithm, Option<String>)>,
}

impl Stated {
    /// Reads `Content-MD5`, `x-amz-checksum-…`, `x-amz-trailer` and `x-amz-sdk-checksum-algorithm`.
    pub fn of(headers: &HeaderMap) -> S3Result<Stated> {
        let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
        let md5 = text("content-md5").map(decode_md5).transpose()?;
        let mut values = Algorithm::ALL.into_iter().filter_map(|a| text(a.header()).map(|value| (a, value)));
        if let Some((algorithm, value)) = values.next() {
            if values.next().is_some() {
                return Err(s3_error!(
                    InvalidRequest,
                    "Expecting a single x-amz-checksum- header. Multiple checksum types are not allowed."
                ));
            }
            decode(algorithm, value)?;
            return Ok(Stated { md5, checksum: Some((algorithm, Some(value.to_owned()))) });
        }
        let trailer = text("x-amz-trailer").unwrap_or("");
        let announced = trailer
            .split(',')
            .find_map(|name| Algorithm::ALL.into_iter().find(|a| a.header().eq_ignore_ascii_case(name.trim())));
        let named = match text("x-amz-sdk-checksum-algorithm").or(text("x-amz-checksum-algorithm")) {
            Some(name) => Some(Algorithm::parse(name)?),
            None => None,
        };
        Ok(Stated { md5, checksum: announced.or(named).map(|algorithm| (algorithm, None)) })
    }

    /// Compares with what was received. `trailers` are those that came after the bytes.
    pub fn compare(&self, md5: &[u8; 16], actual: &Checksum, trailers: Option<&HeaderMap>) -> S3Result<()> {
        if self.md5.as_ref().is_some_and(|stated| stated != md5) {
            return Err(s3_error!(BadDigest, "The Content-MD5 you specified did not match what we received."));
        }
        let Some((algorithm, in_header)) = &self.checksum else { return Ok(()) };
        let in_trailer = trailers.and_then(|t| t.get(algorithm.header())).and_then(|value| value.to_str().ok());
        let Some(stated) = in_header.as_deref().or(in_trailer) else { return Ok(()) };
        decode(*algorithm, stated)?;
        if actual.algorithm == *algorithm && actual.value == stated {
            return Ok(());
        }
        let name = algorithm.name();
        Err(s3_error!(BadDigest, "The {name} you specified did not match the calculated checksum."))
    }

    /// The algorithm to compute: the client's, or S3's default.
    pub fn algorithm(&self) -> Algorithm {
        self.checksum.as_ref().map_or(Algorithm::Crc64Nvme, |(algorithm, _)| *algorithm)
    }
}

/// Checks a whole body that is at hand against what its headers state.
pub fn check_body(headers: &HeaderMap, body: &[u8]) -> S3Result<()> {
    use md5::Digest as _;
    let stated = Stated::of(headers)?;
    let mut hasher = stated.algorithm().hasher();
    hasher.update(body);
    let actual = Checksum::finish(stated.algorithm(), hasher);
    stated.compare(&md5::Md5::digest(body).into(), &actual, None)
}

/// The body is not what the signature covers.
pub fn body_mismatch() -> S3Error {
    super::error_with_code(
        "XAmzContentSHA256Mismatch",
        http::StatusCode::BAD_REQUEST,
        "The provided 'x-amz-content-sha256' header does not match what was computed.",
    )
}

fn decode(algorithm: Algorithm, value: &str) -> S3Result<Vec<u8>> {
    BASE64_STANDARD.decode(value).ok().filter(|bytes| bytes.len() == algorithm.width()).ok_or_else(|| {
        let header = algorithm.header();
        s3_error!(
            InvalidRequest,
            "Value for {header} header is invalid: it must be {} bytes in base 64.",
            algorithm.width()
        )
    })
}

fn decode_md5(value: &str) -> S3Result<[u8; 16]> {
    BASE64_STANDARD.decode(value).ok().and_then(|bytes| bytes.try_into().ok()).ok_or_else(|| -> S3Error {
        s3_error!(InvalidDigest, "The Content-MD5 you specified is not valid: it must be 16 bytes in base 64.")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (http::HeaderName::from_static(name), value.parse().unwrap())).collect()
    }

    fn code(result: S3Result<impl std::fmt::Debug>) -> String {
        result.unwrap_err().code().as_str().to_owned()
    }

    #[test]
    fn known_values() {
        // The check values of the algorithms' definitions, for the text "123456789".
        for (algorithm, hexadecimal) in [
            (Algorithm::Crc32, "cbf43926"),
            (Algorithm::Crc32c, "e3069283"),
            (Algorithm::Crc64Nvme, "ae8b14860a799888"),
            (Algorithm::Sha1, "f7c3bc1d808e04732adf679965ccc34ca7ae3441"),
        ] {
            let mut hasher = algorithm.hasher();
            hasher.update(b"123456789");
            let sum = Checksum::finish(algorithm, hasher);
            assert_eq!(hex::encode(BASE64_STANDARD.decode(sum.value).unwrap()), hexadecimal, "{algorithm:?}");
        }
    }

    #[test]
    fn a_wrong_value_is_a_bad_digest_in_header_and_trailer() {
        let good = headers(&[("x-amz-checksum-crc32", "y/Q5Jg=="), ("content-md5", "JfnnlDI7RTiF9RgfG2JNCw==")]);
        check_body(&good, b"123456789").unwrap();
        assert_eq!(code(check_body(&good, b"123456780")), "BadDigest");
        assert_eq!(code(check_body(&headers(&[("x-amz-checksum-crc32", "y/Q5Jg==")]), b"12345678")), "BadDigest");

        let stated = Stated::of(&headers(&[("x-amz-trailer", "x-amz-checksum-crc32")])).unwrap();
        assert_eq!(stated.checksum, Some((Algorithm::Crc32, None)));
        let mut hasher = Algorithm::Crc32.hasher();
        hasher.update(b"123456789");
        let sum = Checksum::finish(Algorithm::Crc32, hasher);
        stated.compare(&[0; 16], &sum, Some(&good)).unwrap();
        let wrong = headers(&[("x-amz-checksum-crc32", "AAAAAA==")]);
        assert_eq!(code(stated.compare(&[0; 16], &sum, Some(&wrong))), "BadDigest");
    }

    #[test]
    fn malformed_and_double_values_are_refused() {
        assert_eq!(code(Stated::of(&headers(&[("x-amz-checksum-crc32", "AAAA")]))), "InvalidRequest");
        assert_eq!(code(Stated::of(&headers(&[("content-md5", "AAAA")]))), "InvalidDigest");
        let two = headers(&[("x-amz-checksum-crc32", "y/Q5Jg=="), ("x-amz-checksum-crc32c", "y/Q5Jg==")]);
        assert_eq!(code(Stated::of(&two)), "InvalidRequest");
        assert_eq!(code(Algorithm::parse("MD4")), "InvalidRequest");
    }
}
