//! Whose a request is, where proxies stand between. Knows headers, and no limit.

use std::net::{IpAddr, SocketAddr};

use axum::http::{HeaderMap, header};
use ipnet::IpNet;

/// The nearest address that is none of the trusted proxies'. What stands before it in the headers anybody may have written.
pub(crate) fn client_address(peer: IpAddr, headers: &HeaderMap, proxies: &[IpNet]) -> IpAddr {
    let mut nearest = peer.to_canonical();
    let mut hops = hops(headers).into_iter().rev();
    while proxies.iter().any(|network| network.contains(&nearest)) {
        let Some(Some(address)) = hops.next() else { break };
        nearest = address;
    }
    nearest
}

/// The addresses that proxies have added, the nearest last; `None`: it cannot be read. `X-Forwarded-For`, which is what
/// proxies write, else `Forwarded` (RFC 7239).
fn hops(headers: &HeaderMap) -> Vec<Option<IpAddr>> {
    let items = |name: &str| -> Vec<_> {
        let values = headers.get_all(name).iter().map(|value| value.to_str().unwrap_or_default());
        values.flat_map(|value| value.split(',')).collect()
    };
    let plain = items("x-forwarded-for");
    if !plain.is_empty() {
        return plain.into_iter().map(address).collect();
    }
    items(header::FORWARDED.as_str()).into_iter().map(|item| forwarded_for(item).and_then(address)).collect()
}

/// The value of `for` in an element of `Forwarded`.
fn forwarded_for(element: &str) -> Option<&str> {
    let mut pairs = element.split(';').filter_map(|pair| pair.trim().split_once('='));
    pairs.find(|(name, _)| name.eq_ignore_ascii_case("for")).map(|(_, value)| value.trim_matches('"'))
}

/// An address, with or without a port or the brackets of IPv6.
fn address(text: &str) -> Option<IpAddr> {
    let text = text.trim();
    let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
    let with_port = || text.parse().map(|address: SocketAddr| address.ip());
    bare.parse().or_else(|_| with_port()).ok().map(|address: IpAddr| address.to_canonical())
}

#[cfg(test)]
mod tests {
    use axum::http::{HeaderName, HeaderValue};

    use super::*;

    #[track_caller]
    fn check(peer: &str, headers: &[(&'static str, &'static str)], expected: &str) {
        let proxies = ["10.0.0.0/8".parse().unwrap(), "fd00::/8".parse().unwrap()];
        let mut map = HeaderMap::new();
        for &(name, value) in headers {
            map.append(HeaderName::from_static(name), HeaderValue::from_bytes(value.as_bytes()).unwrap());
        }
        let found = client_address(peer.parse().unwrap(), &map, &proxies);
        assert_eq!(found, expected.parse::<IpAddr>().unwrap(), "{peer} {headers:?}");
    }

    #[test]
    fn the_nearest_address_that_is_no_trusted_proxys_counts() {
        let forwarded_for = |value| [("x-forwarded-for", value)];
        check("192.0.2.9", &forwarded_for("203.0.113.7"), "192.0.2.9");
        check("10.0.0.1", &[], "10.0.0.1");
        check("10.0.0.1", &forwarded_for("203.0.113.7"), "203.0.113.7");
        check("::ffff:10.0.0.1", &forwarded_for("203.0.113.7"), "203.0.113.7");
        // Whoever is at the left has sent what he liked.
        check("10.0.0.1", &forwarded_for("1.1.1.1, 203.0.113.7"), "203.0.113.7");
        check("10.0.0.1", &forwarded_for("1.1.1.1, 203.0.113.7 , 10.0.0.2,fd00::3"), "203.0.113.7");
        check("10.0.0.1", &forwarded_for("10.0.0.3, 10.0.0.2"), "10.0.0.3");
        check("10.0.0.1", &[forwarded_for("203.0.113.7")[0], forwarded_for("10.0.0.2")[0]], "203.0.113.7");
    }

    #[test]
    fn what_cannot_be_read_ends_the_way_at_the_last_proxy() {
        for value in ["", "unknown", "203.0.113.7, _hidden", "203.0.113.7,", "203.0.113.999", "é"] {
            check("10.0.0.1", &[("x-forwarded-for", value)], "10.0.0.1");
        }
        check("10.0.0.1", &[("x-forwarded-for", "203.0.113.7, x, 10.0.0.2")], "10.0.0.2");
    }

    #[test]
    fn ports_brackets_and_the_standard_header_are_read() {
        for value in ["203.0.113.7:4711", " 203.0.113.7 "] {
            check("10.0.0.1", &[("x-forwarded-for", value)], "203.0.113.7");
        }
        for value in ["2001:db8::1", "[2001:db8::1]", "[2001:db8::1]:4711"] {
            check("fd00::1", &[("x-forwarded-for", value)], "2001:db8::1");
        }
        for value in [r#"for="[2001:db8::1]:4711";proto=https"#, "by=10.0.0.1;For=\"[2001:db8::1]\""] {
            check("10.0.0.1", &[("forwarded", value)], "2001:db8::1");
        }
        check("10.0.0.1", &[("forwarded", "for=1.1.1.1, for=203.0.113.7, for=10.0.0.2")], "203.0.113.7");
        check("10.0.0.1", &[("forwarded", "for=203.0.113.7, proto=https")], "10.0.0.1");
        let both = [("forwarded", "for=1.1.1.1"), ("x-forwarded-for", "203.0.113.7")];
        check("10.0.0.1", &both, "203.0.113.7");
    }
}
