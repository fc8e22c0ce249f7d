//! Why a connection over TLS did not come about: what to correct differs.

use std::{error::Error, fmt, io, sync::Arc};

use redis::RedisError;
use rustls::{AlertDescription, CertificateError};

/// Why two sides do not trust each other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Distrust {
    /// Nobody whom we trust has signed its certificate.
    UnknownAuthority,
    /// Its certificate is somebody else's.
    OtherName,
    /// Its certificate was good once, or will be.
    Expired,
    /// It answers, and not in TLS.
    NoTls,
    /// It does not like us, by this alert.
    Refuses(String),
    /// Anything else.
    Other(String),
}

impl fmt::Display for Distrust {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnknownAuthority => f.write_str("no authority that is trusted has signed its certificate"),
            Self::OtherName => f.write_str("its certificate is for another host name"),
            Self::Expired => f.write_str("its certificate is not valid at this time"),
            Self::NoTls => f.write_str("it does not speak TLS"),
            Self::Refuses(alert) => write!(f, "it refuses our side of TLS ({alert})"),
            Self::Other(reason) => write!(f, "TLS: {reason}"),
        }
    }
}

impl Distrust {
    /// What of TLS is behind an error, if it is that.
    pub(super) fn behind(error: &RedisError) -> Option<Self> {
        Some(match tls_error(error)? {
            rustls::Error::InvalidCertificate(error) => match error {
                // The latter by an authority of the same name: one that was made anew, for example.
                CertificateError::UnknownIssuer | CertificateError::BadSignature => Self::UnknownAuthority,
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
                    Self::OtherName
                }
                CertificateError::Expired
                | CertificateError::ExpiredContext { .. }
                | CertificateError::NotValidYet
                | CertificateError::NotValidYetContext { .. } => Self::Expired,
                error => Self::Other(format!("its certificate: {error}")),
            },
            rustls::Error::InvalidMessage(_) => Self::NoTls,
            rustls::Error::AlertReceived(AlertDescription::CloseNotify) => return None,
            rustls::Error::AlertReceived(alert) => Self::Refuses(format!("{alert:?}")),
            error => Self::Other(error.to_string()),
        })
    }
}

/// The error of the TLS library that the Redis library passes on, directly or through one of the system.
pub(super) fn tls_error(error: &RedisError) -> Option<&rustls::Error> {
    let source = error.source()?;
    let source: &(dyn Error + 'static) = match source.downcast_ref::<Arc<dyn Error + Send + Sync>>() {
        Some(shared) => &**shared,
        None => source,
    };
    source.downcast_ref().or_else(|| source.downcast_ref::<io::Error>()?.get_ref()?.downcast_ref())
}
