//! How many connections there may be, on the node and from one address, and how fast they may come. Knows no answer over HTTP
//! and no connection: who is admitted gets a guard, and has left when that is dropped.

use std::{
    collections::HashMap,
    hash::Hash,
    net::{IpAddr, Ipv6Addr},
    sync::Arc,
};

use axum::http::HeaderMap;
use ipnet::IpNet;
use parking_lot::Mutex;
use tidings_protocol::{CloseCode, UserId};

use crate::{config::Settings, forwarded::client_address, rate::Rate};

/// The limits of a node.
#[derive(Debug)]
pub(crate) struct Admission {
    connections: Arc<Limit<()>>,
    /// `None`: no limit, or nothing is known of the proxies in between.
    addresses: Option<PerAddress>,
    users: Option<Arc<Limit<UserId>>>,
    rate: Option<Rate>,
}

#[derive(Debug)]
struct PerAddress {
    limit: Arc<Limit<IpAddr>>,
    proxies: Vec<IpNet>,
}

/// Held as long as a connection lives.
#[derive(Debug)]
pub(crate) struct Admitted {
    _connection: Place<()>,
    _address: Option<Place<IpAddr>>,
}

/// Why nobody is taken in now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Refused {
    /// The node stops.
    Draining,
    /// The node has as many connections as it may have.
    Connections,
    /// This address has.
    Address,
    /// This user has.
    User,
    /// They come too fast.
    Rate,
    /// There are as many connections as there may be that are nothing but HTTP, or were nothing else yet.
    Http,
}

impl Refused {
    /// As a metric's label and in logs.
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Draining => "draining",
            Self::Connections => "connections",
            Self::Address => "address",
            Self::User => "user",
            Self::Rate => "rate",
            Self::Http => "http",
        }
    }

    /// For whoever sent the request.
    pub(crate) const fn detail(self) -> &'static str {
        match self {
            Self::Draining => "this node is stopping; connect again",
            Self::Connections | Self::Http => {
                "this node has as many connections as it may have; connect again later"
            }
            Self::Address => "there are as many connections from this address as there may be",
            Self::User => "this user has as many connections as he may have",
            Self::Rate => "too many connections come at once; connect again later",
        }
    }

    /// For who cannot see more than that.
    pub(crate) const fn close_code(self) -> CloseCode {
        match self {
            Self::Draining => CloseCode::ServiceRestart,
            Self::Connections | Self::Rate | Self::Http => CloseCode::TryAgainLater,
            Self::Address | Self::User => CloseCode::TooMany,
        }
    }
}

impl Admission {
    pub(crate) fn new(settings: &Settings) -> Self {
        let addresses = settings.connections_per_address_max.zip(settings.trusted_proxies.clone());
        Self {
            connections: Limit::new(settings.connections_max),
            addresses: addresses.map(|(max, proxies)| PerAddress { limit: Limit::new(max), proxies }),
            users: settings.connections_per_user_max.map(Limit::new),
            rate: settings.accept_rate_max.map(Rate::new),
        }
    }

    /// How many there are.
    pub(crate) fn admitted(&self) -> usize {
        self.connections.taken.lock().get(&()).copied().unwrap_or(0)
    }

    /// Whether a connection may begin now, for a request with these headers from `peer`.
    pub(crate) fn admit(&self, headers: &HeaderMap, peer: IpAddr) -> Result<Admitted, Refused> {
        let connection = self.connections.take(()).ok_or(Refused::Connections)?;
        let take = |addresses: &PerAddress| {
            let address = client_address(peer, headers, &addresses.proxies);
            addresses.limit.take(counted_as(address)).ok_or(Refused::Address)
        };
        let address = self.addresses.as_ref().map(take).transpose()?;
        // Last, so that who is refused anyway takes no turn from others.
        if self.rate.as_ref().is_some_and(|rate| rate.take(1).is_err()) {
            return Err(Refused::Rate);
        }
        Ok(Admitted { _connection: connection, _address: address })
    }
}

impl Admission {
    /// Whether one more connection of the user may begin.
    pub(crate) fn admit_user(&self, user: UserId) -> Result<AdmittedUser, Refused> {
        let place = self.users.as_ref().map(|users| users.take(user).ok_or(Refused::User)).transpose()?;
        Ok(AdmittedUser { _place: place })
    }
}

/// Held as long as a user's connection lives.
#[derive(Debug)]
pub(crate) struct AdmittedUser {
    _place: Option<Place<UserId>>,
}

/// What counts as one address: of IPv6 the network of 64 bits, all of which a single customer has.
fn counted_as(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => address,
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
    }
}

/// At most so many for each key, and at least one.
#[derive(Debug)]
struct Limit<K> {
    max: usize,
    taken: Mutex<HashMap<K, usize>>,
}

/// One of a key's places, which is given back when it is dropped.
#[derive(Debug)]
struct Place<K: Eq + Hash> {
    limit: Arc<Limit<K>>,
    key: K,
}

impl<K: Clone + Eq + Hash> Limit<K> {
    fn new(max: usize) -> Arc<Self> {
        Arc::new(Self { max, taken: Mutex::default() })
    }

    fn take(self: &Arc<Self>, key: K) -> Option<Place<K>> {
        let mut taken = self.taken.lock();
        let places = taken.entry(key.clone()).or_default();
        if *places >= self.max {
            return None;
        }
        *places += 1;
        Some(Place { limit: Arc::clone(self), key })
    }
}

impl<K: Eq + Hash> Drop for Place<K> {
    fn drop(&mut self) {
        let mut taken = self.limit.taken.lock();
        if let Some(places) = taken.get_mut(&self.key) {
            *places -= 1;
            if *places == 0 {
                taken.remove(&self.key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_key_has_its_places_and_gets_them_back() {
        let limit = Limit::new(2);
        let (first, second) = (limit.take("a").unwrap(), limit.take("a").unwrap());
        assert!(limit.take("a").is_none());
        let other = limit.take("b").unwrap();
        drop(first);
        let third = limit.take("a").unwrap();
        assert!(limit.take("a").is_none());
        drop((second, third, other));
        assert!(limit.taken.lock().is_empty(), "nothing is kept of who has left");
    }

    #[test]
    fn an_address_of_version_6_counts_with_its_neighbours() {
        let counted = |text: &str| counted_as(text.parse().unwrap());
        assert_eq!(counted("2001:db8:1:2::3"), counted("2001:db8:1:2:ffff::4"));
        assert_ne!(counted("2001:db8:1:2::3"), counted("2001:db8:1:3::3"));
        assert_ne!(counted("192.0.2.1"), counted("192.0.2.2"));
    }
}
