//! A connection over TLS, after its handshake: records between a shard and a socket, without waiting and without a task.
//!
//! Knows no file and no setting: whoever hands the connection over has chosen certificates and versions.

use std::{
    cell::RefCell,
    io::{self, IoSlice, Read as _},
    net::TcpStream,
};

use rustls::ServerConnection;
use smallvec::SmallVec;

use crate::shard::Socket;

/// The most that is held as ciphertext, at about: one full record. More plaintext is taken only when the system has taken that,
/// because what waits here belongs to one client, and what waits in the shard to all.
const HELD_BYTES_MAX: usize = 16 * 1024;
/// Reads of the socket for one buffer of plaintext. Records may be empty, so that their number is no measure of what they bring;
/// a client that means well is far from this.
const READS_MAX: usize = 256;

/// How bytes travel between the service and a peer.
#[derive(Debug)]
pub enum Transport {
    /// As they are.
    Plain(TcpStream),
    /// In TLS, whose handshake is done.
    Tls(TcpStream, Box<ServerConnection>),
}

#[derive(Debug)]
pub(crate) struct TlsSocket {
    socket: mio::net::TcpStream,
    /// A shard is one thread's.
    tls: RefCell<Box<ServerConnection>>,
}

impl TlsSocket {
    pub(crate) fn new(socket: TcpStream, mut tls: Box<ServerConnection>) -> Self {
        tls.set_buffer_limit(Some(HELD_BYTES_MAX));
        Self { socket: mio::net::TcpStream::from_std(socket), tls: RefCell::new(tls) }
    }

    /// What a poller watches.
    pub(crate) fn source(&mut self) -> &mut mio::net::TcpStream {
        &mut self.socket
    }

    /// Gives the system what is held; `WouldBlock`: it does not take all of it now.
    fn send(&self, tls: &mut ServerConnection) -> io::Result<()> {
        while tls.wants_write() {
            match tls.write_tls(&mut &self.socket) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

impl Socket for TlsSocket {
    fn write(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        let tls = &mut **self.tls.borrow_mut();
        self.send(tls)?;
        let mut slices: SmallVec<[IoSlice<'_>; 16]> = SmallVec::from_slice(slices);
        let mut rest = &mut slices[..];
        let mut written = 0;
        while !rest.is_empty() {
            // Everything that fits goes into one record, however many pieces it has.
            let taken = io::Write::write_vectored(&mut tls.writer(), rest)?;
            if taken == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            written += taken;
            IoSlice::advance_slices(&mut rest, taken);
            match self.send(tls) {
                Ok(()) => {}
                // What is held goes out when the socket takes something again.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(written)
    }

    /// Less than there was room for: neither the socket nor what was decrypted has more.
    fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let tls = &mut **self.tls.borrow_mut();
        let mut filled = 0;
        for _ in 0..READS_MAX {
            while filled < buffer.len() {
                match tls.reader().read(&mut buffer[filled..]) {
                    // Whether the peer said that it writes no more or not: messages have a close of their own.
                    Ok(0) => return Ok(filled),
                    Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(filled),
                    Ok(length) => filled += length,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) => return Err(error),
                }
            }
            if filled == buffer.len() {
                return Ok(filled);
            }
            match tls.read_tls(&mut &self.socket) {
                Ok(_) => {
                    let processed = tls.process_new_packets();
                    // An alert, or an answer to a message of TLS itself. If it does not go out now, it does later.
                    let _ = self.send(tls);
                    processed.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // An error shows again.
                Err(_) if filled > 0 => return Ok(filled),
                Err(error) => return Err(error),
            }
        }
        Err(io::Error::new(io::ErrorKind::InvalidData, "records without anything in them"))
    }

    fn flush(&self) -> io::Result<()> {
        self.send(&mut self.tls.borrow_mut())
    }
}

impl Drop for TlsSocket {
    /// Says that nothing more comes, as far as the system takes it.
    fn drop(&mut self) {
        self.tls.get_mut().send_close_notify();
        let _ = self.flush();
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::Write as _,
        net::TcpListener,
        sync::Arc,
        thread::{JoinHandle, sleep, spawn},
        time::Duration,
    };

    use rustls::{
        ClientConfig, ClientConnection, RootCertStore, ServerConfig, StreamOwned,
        crypto::ring,
        pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer, ServerName},
    };

    use super::*;

    type ClientEnd = StreamOwned<ClientConnection, TcpStream>;

    /// Both ends after the handshake.
    fn connected() -> (TlsSocket, ClientEnd) {
        let signed = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(signed.signing_key.serialize_der()));
        let provider = Arc::new(ring::default_provider());
        let mut roots = RootCertStore::empty();
        roots.add(signed.cert.der().clone()).unwrap();
        let config = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let client = spawn(move || {
            let name = ServerName::try_from("localhost").unwrap();
            let tls = ClientConnection::new(Arc::new(config), name).unwrap();
            let mut client = StreamOwned::new(tls, TcpStream::connect(address).unwrap());
            client.conn.complete_io(&mut client.sock).unwrap();
            client
        });
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![signed.cert.der().clone()], key)
            .unwrap();
        let mut tls = ServerConnection::new(Arc::new(config)).unwrap();
        let (mut socket, _) = listener.accept().unwrap();
        while tls.is_handshaking() {
            tls.complete_io(&mut socket).unwrap();
        }
        socket.set_nonblocking(true).unwrap();
        (TlsSocket::new(socket, Box::new(tls)), client.join().unwrap())
    }

    /// Calls it again while it has nothing to do.
    fn until<T>(mut call: impl FnMut() -> io::Result<T>) -> T {
        loop {
            match call() {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => sleep(Duration::from_millis(1)),
                done => return done.unwrap(),
            }
        }
    }

    fn pattern(length: usize) -> Vec<u8> {
        (0..=250).cycle().take(length).collect()
    }

    fn reading(mut client: ClientEnd, length: usize) -> JoinHandle<Vec<u8>> {
        spawn(move || {
            let mut read = vec![0; length];
            client.read_exact(&mut read).unwrap();
            read
        })
    }

    #[test]
    fn what_was_taken_arrives_by_flushing_alone() {
        let (socket, client) = connected();
        let sent = pattern(64 << 20);
        let mut taken = 0;
        while let Ok(length) =
            socket.write(&[IoSlice::new(&sent[taken..][..100]), IoSlice::new(&sent[taken + 100..])])
        {
            taken += length;
        }
        assert_eq!(socket.flush().unwrap_err().kind(), io::ErrorKind::WouldBlock, "some of it is held");
        let client = reading(client, taken);
        until(|| socket.flush());
        assert!(client.join().unwrap() == sent[..taken]);
    }

    #[test]
    fn nothing_more_is_taken_while_something_is_held() {
        let (socket, _client) = connected();
        let sent = pattern(64 << 20);
        while socket.write(&[IoSlice::new(&sent)]).is_ok() {}
        for _ in 0..3 {
            let again = socket.write(&[IoSlice::new(&sent)]);
            assert_eq!(again.unwrap_err().kind(), io::ErrorKind::WouldBlock);
        }
    }

    #[test]
    fn a_read_that_is_short_leaves_nothing_behind() {
        let (socket, mut client) = connected();
        let sent = pattern(100_000);
        client.write_all(&sent).unwrap();
        let mut read = Vec::new();
        let mut buffer = vec![0; 16 * 1024];
        while read.len() < sent.len() {
            let length = until(|| socket.read(&mut buffer));
            read.extend_from_slice(&buffer[..length]);
            if length < buffer.len() {
                let decrypted =
                    socket.tls.borrow_mut().process_new_packets().unwrap().plaintext_bytes_to_read();
                assert_eq!(decrypted, 0);
            }
        }
        assert!(read == sent);
    }

    #[test]
    fn the_end_of_either_side_is_told_as_an_end() {
        let (socket, mut client) = connected();
        client.write_all(b"last").unwrap();
        client.conn.send_close_notify();
        client.conn.complete_io(&mut client.sock).unwrap();
        let mut buffer = [0; 16];
        assert_eq!(until(|| socket.read(&mut buffer)), 4);
        assert_eq!(until(|| socket.read(&mut buffer)), 0);
        drop(socket);
        // A peer that had not said so would be an error.
        assert_eq!(client.read(&mut buffer).unwrap(), 0);
    }

    #[test]
    fn what_is_no_record_is_an_error() {
        let (socket, mut client) = connected();
        client.sock.write_all(&[0x17, 3, 3, 0, 32]).unwrap();
        client.sock.write_all(&[7; 32]).unwrap();
        let mut buffer = [0; 16];
        loop {
            match socket.read(&mut buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => sleep(Duration::from_millis(1)),
                Err(error) => return assert_eq!(error.kind(), io::ErrorKind::InvalidData),
                Ok(length) => panic!("{length} bytes"),
            }
        }
    }
}
