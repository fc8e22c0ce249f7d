//! Certificates and keys in PEM files: read, checked, and told with their setting when they cannot be used.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use rustls::{
    InconsistentKeys,
    crypto::ring,
    pki_types::{
        CertificateDer, PrivateKeyDer,
        pem::{self, PemObject as _},
    },
    sign::CertifiedKey,
};
use x509_cert::der::Decode as _;

/// Larger than any chain; a setting that names something else by mistake shall not fill the memory.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Why a certificate, its key or the authorities cannot be used. Names the setting, the path, and what was expected.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    /// A file cannot be read.
    #[error("{setting}: cannot read `{}`: {source}; expected {expected}", path.display())]
    Unreadable {
        /// The setting that names it.
        setting: &'static str,
        /// Where it is.
        path: PathBuf,
        /// What should be in it.
        expected: &'static str,
        /// Why.
        source: io::Error,
    },
    /// A file has something else in it.
    #[error("{setting}: `{}` {found}; expected {expected}", path.display())]
    Unusable {
        /// The setting that names it.
        setting: &'static str,
        /// Where it is.
        path: PathBuf,
        /// What is in it.
        found: String,
        /// What should be in it.
        expected: &'static str,
    },
    /// The Redis library does not take what was read.
    #[error("TIDINGS_REDIS_CA, TIDINGS_REDIS_CERT, TIDINGS_REDIS_KEY: {0}")]
    Redis(String),
    /// The TLS library does not do what it is asked for.
    #[error("TLS cannot be set up: {0}")]
    Tls(rustls::Error),
}

const CERTIFICATE: &str =
    "a PEM file with the certificate first and its chain behind it (`BEGIN CERTIFICATE`)";
const AUTHORITIES: &str =
    "a PEM file with the certificates of the authorities to trust (`BEGIN CERTIFICATE`)";
const KEY: &str = "a PEM file with the private key of the certificate, not encrypted (`BEGIN PRIVATE KEY`, \
                   `BEGIN RSA PRIVATE KEY` or `BEGIN EC PRIVATE KEY`)";

/// Where a certificate and its key are, by two settings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CertificateFiles {
    /// The certificate and its chain.
    pub certificate: PathBuf,
    /// The private key.
    pub key: PathBuf,
    /// The settings that name them.
    pub settings: [&'static str; 2],
}

/// What the two files have, as it is there.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Pair {
    certificate: Vec<u8>,
    key: Vec<u8>,
}

impl std::fmt::Debug for Pair {
    /// Without the key.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pair").field("certificate_bytes", &self.certificate.len()).finish_non_exhaustive()
    }
}

impl CertificateFiles {
    /// Reads both files.
    pub(super) fn read(&self) -> Result<Pair, CertificateError> {
        let [certificate, key] = self.settings;
        Ok(Pair {
            certificate: read(certificate, &self.certificate, CERTIFICATE)?,
            key: read(key, &self.key, KEY)?,
        })
    }

    /// The same without keeping a thread from its connections while a disk is slow.
    pub(super) async fn read_soon(&self) -> Result<Pair, CertificateError> {
        let files = self.clone();
        let reading = tokio::task::spawn_blocking(move || files.read()).await;
        reading.unwrap_or_else(|error| Err(CertificateError::Tls(rustls::Error::General(error.to_string()))))
    }
}

impl Pair {
    /// The chain with the key that signs for it.
    pub(super) fn certified(&self, files: &CertificateFiles) -> Result<CertifiedKey, CertificateError> {
        let [certificate_setting, key_setting] = files.settings;
        let chain = certificates(certificate_setting, &files.certificate, CERTIFICATE, &self.certificate)?;
        let unusable_key = |found: String| CertificateError::Unusable {
            setting: key_setting,
            path: files.key.clone(),
            found,
            expected: KEY,
        };
        let key = PrivateKeyDer::from_pem_slice(&self.key).map_err(|error| {
            unusable_key(match error {
                pem::Error::NoItemsFound if has_encrypted_key(&self.key) => {
                    "has an encrypted private key".to_owned()
                }
                pem::Error::NoItemsFound => "has no private key in it".to_owned(),
                error => format!("is no readable PEM file ({error})"),
            })
        })?;
        CertifiedKey::from_der(chain, key, &ring::default_provider()).map_err(|error| match error {
            rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => unusable_key(format!(
                "has the key of another certificate than `{}` ({certificate_setting})",
                files.certificate.display()
            )),
            rustls::Error::InvalidCertificate(error) => CertificateError::Unusable {
                setting: certificate_setting,
                path: files.certificate.clone(),
                found: format!("has a certificate that cannot be read ({error:?})"),
                expected: CERTIFICATE,
            },
            error => unusable_key(format!("has a private key that cannot be used ({error})")),
        })
    }
}

/// The certificates in a file, as it is, which were checked to be some.
pub(crate) fn certificates_in(setting: &'static str, path: &Path) -> Result<Vec<u8>, CertificateError> {
    let text = read(setting, path, AUTHORITIES)?;
    certificates(setting, path, AUTHORITIES, &text)?;
    Ok(text)
}

/// A certificate and its key in their files, as they are, which were checked to belong together.
pub(crate) fn pair_in(files: &CertificateFiles) -> Result<(Vec<u8>, Vec<u8>), CertificateError> {
    let pair = files.read()?;
    pair.certified(files)?;
    Ok((pair.certificate, pair.key))
}

/// The certificate that the service shows, as the files have it, without its chain.
pub(crate) fn own_certificate(files: &CertificateFiles) -> Result<CertificateDer<'static>, CertificateError> {
    let text = read(files.settings[0], &files.certificate, CERTIFICATE)?;
    Ok(certificates(files.settings[0], &files.certificate, CERTIFICATE, &text)?.swap_remove(0))
}

/// Until when a certificate is good; `None`: it does not say it in a way that can be read.
pub(super) fn expiry(certified: &CertifiedKey) -> Option<jiff::Timestamp> {
    let certificate = x509_cert::Certificate::from_der(certified.end_entity_cert().ok()?).ok()?;
    let seconds = certificate.tbs_certificate.validity.not_after.to_unix_duration().as_secs();
    jiff::Timestamp::from_second(i64::try_from(seconds).ok()?).ok()
}

fn read(setting: &'static str, path: &Path, expected: &'static str) -> Result<Vec<u8>, CertificateError> {
    let reading = || {
        let file = fs::metadata(path)?;
        if !file.is_file() {
            // It may be one that can be read once only, or that lets its reader wait.
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no regular file"));
        }
        if file.len() > FILE_BYTES_MAX {
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, "it is far too large"));
        }
        fs::read(path)
    };
    reading().map_err(|source| CertificateError::Unreadable {
        setting,
        path: path.to_owned(),
        expected,
        source,
    })
}

fn certificates(
    setting: &'static str,
    path: &Path,
    expected: &'static str,
    text: &[u8],
) -> Result<Vec<CertificateDer<'static>>, CertificateError> {
    let unusable = |found| CertificateError::Unusable { setting, path: path.to_owned(), found, expected };
    let found = CertificateDer::pem_slice_iter(text).collect::<Result<Vec<_>, _>>();
    let found = found.map_err(|error| unusable(format!("is no readable PEM file ({error})")))?;
    if found.is_empty() { Err(unusable("has no certificate in it".to_owned())) } else { Ok(found) }
}

fn has_encrypted_key(text: &[u8]) -> bool {
    let words = b"BEGIN ENCRYPTED PRIVATE KEY";
    text.windows(words.len()).any(|window| window == words)
}
