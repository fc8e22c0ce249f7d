//! TLS on the public listener: handshakes, and the certificate, which is read anew when its files change.

mod files;

use std::{io, sync::Arc, time::Duration};

use parking_lot::RwLock;
use rustls::{
    ServerConfig,
    crypto::ring,
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::{Instant, interval, timeout},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_util::sync::CancellationToken;

use files::Pair;

pub use files::{CertificateError, CertificateFiles};
pub(crate) use files::{certificates_in, own_certificate, pair_in};

/// Between two looks at the files.
const LOOK_INTERVAL: Duration = Duration::from_secs(3);
/// A certificate that expires so soon should have been renewed.
const EXPIRES_SOON: Duration = Duration::from_hours(14 * 24);
/// Between two warnings of that.
const WARN_INTERVAL: Duration = Duration::from_hours(24);
/// For a client that speaks plain HTTP to hear why it gets no answer.
const PLAIN_TIMEOUT: Duration = Duration::from_secs(2);
const PLAIN_ANSWER: &[u8] = b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nConnection: close\r\n\
    Content-Length: 58\r\n\r\nthis port speaks TLS: connect with https:// or with wss://";

/// Makes TLS connections with the certificate that its files have.
#[derive(Clone, Debug)]
pub struct Tls {
    files: Arc<CertificateFiles>,
    shown: Arc<Shown>,
    /// What `shown` was made of.
    pair: Arc<Pair>,
    config: Arc<ServerConfig>,
}

/// The certificate that new handshakes show.
#[derive(Debug)]
struct Shown(RwLock<Arc<CertifiedKey>>);

impl ResolvesServerCert for Shown {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0.read()))
    }
}

impl Tls {
    /// Reads the files.
    pub fn load(files: CertificateFiles) -> Result<Self, CertificateError> {
        let pair = files.read()?;
        let certified = pair.certified(&files)?;
        let shown = Arc::new(Shown(RwLock::new(Arc::new(certified))));
        let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])
            .map_err(CertificateError::Tls)?
            .with_no_client_auth()
            .with_cert_resolver(Arc::clone(&shown) as Arc<dyn ResolvesServerCert>);
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        // Who comes back proves nothing anew, which a rush of clients that lost their connections is glad of. Nothing is kept for it.
        config.ticketer = ring::Ticketer::new().map_err(CertificateError::Tls)?;
        Ok(Self { files: Arc::new(files), shown, pair: Arc::new(pair), config: Arc::new(config) })
    }

    /// Does the handshake. A client that does not speak TLS is told so and turned away.
    pub(crate) async fn accept(&self, mut socket: TcpStream) -> io::Result<TlsStream<TcpStream>> {
        let mut first = [0];
        // Methods of HTTP are words in capitals; a handshake begins with a byte that is no letter.
        if socket.peek(&mut first).await? == 1 && first[0].is_ascii_uppercase() {
            let _ = timeout(PLAIN_TIMEOUT, refuse_plain(&mut socket)).await;
            return Err(io::Error::new(io::ErrorKind::InvalidData, "plain HTTP where TLS is spoken"));
        }
        TlsAcceptor::from(Arc::clone(&self.config)).accept(socket).await
    }

    /// Shows a new certificate when the files have one, until `stop`. Files that cannot be used change nothing and are told of.
    pub(crate) async fn watch(self, stop: CancellationToken) {
        let mut known = Arc::unwrap_or_clone(self.pair);
        let mut unusable = Unusable::default();
        let mut warned = Instant::now();
        tell(&self.files, &self.shown.0.read());
        let mut looks = interval(LOOK_INTERVAL);
        while stop.run_until_cancelled(looks.tick()).await.is_some() {
            let read = self.files.read_soon().await;
            if read.as_ref().is_ok_and(|pair| *pair == known) {
                unusable = Unusable::default();
            } else {
                match read.and_then(|pair| Ok((pair.certified(&self.files)?, pair))) {
                    Ok((certified, pair)) => {
                        tell(&self.files, &certified);
                        *self.shown.0.write() = Arc::new(certified);
                        (known, unusable, warned) = (pair, Unusable::default(), Instant::now());
                    }
                    Err(error) => unusable.found(&error),
                }
            }
            if warned.elapsed() >= WARN_INTERVAL {
                warned = Instant::now();
                warn_of_expiry(&self.files, &self.shown.0.read());
            }
        }
    }
}

/// Files that could not be used at the last look.
#[derive(Debug, Default)]
struct Unusable {
    why: Option<String>,
    told: bool,
}

impl Unusable {
    /// Tells at the second look: a pair is two files, and whoever replaces them does so one after the other.
    fn found(&mut self, error: &CertificateError) {
        let why = error.to_string();
        if self.why.as_ref() != Some(&why) {
            *self = Self { why: Some(why), told: false };
        } else if !std::mem::replace(&mut self.told, true) {
            tracing::warn!("{why}; the certificate that was there before stays in use");
        }
    }
}

async fn refuse_plain(socket: &mut TcpStream) -> io::Result<()> {
    socket.write_all(PLAIN_ANSWER).await?;
    socket.shutdown().await?;
    // A socket that is dropped while something is unread takes back what was written to it.
    let mut unread = [0; 512];
    while socket.read(&mut unread).await? > 0 {}
    Ok(())
}

fn tell(files: &CertificateFiles, certified: &CertifiedKey) {
    let expires = files::expiry(certified);
    tracing::info!(
        certificate = %files.certificate.display(),
        expires = expires.map(tracing::field::display),
        "new connections are shown this certificate"
    );
    warn_of_expiry(files, certified);
}

fn warn_of_expiry(files: &CertificateFiles, certified: &CertifiedKey) {
    let Some(expires) = files::expiry(certified) else { return };
    let certificate = files.certificate.display();
    let left = expires.duration_since(jiff::Timestamp::now());
    if left.is_negative() {
        tracing::warn!(%certificate, %expires, "the certificate (TIDINGS_TLS_CERT) has expired: clients refuse it");
    } else if left.unsigned_abs() < EXPIRES_SOON {
        tracing::warn!(%certificate, %expires, "the certificate (TIDINGS_TLS_CERT) expires soon; renew it");
    }
}
