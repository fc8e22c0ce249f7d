//! What a request shows to say whose it is.

use axum::http::{HeaderMap, HeaderName, header};
use cookie::Cookie;

use super::WayName;
use crate::access::bearer;

/// The subprotocols that carry a credential, because a browser lets a page set nothing else on a WebSocket.
const TICKET_PREFIX: &str = "tidings.ticket.";
const TOKEN_PREFIX: &str = "tidings.jwt.";

/// Cookies of one name that are looked at: a browser may send one for each path and domain.
const SAME_NAME_MAX: usize = 4;

/// Under which names credentials come.
#[derive(Clone, Debug)]
pub(super) struct Names {
    pub(super) session_cookie: String,
    pub(super) token_cookie: String,
}

/// The credentials of a request, by the ways that may know them.
#[derive(Default)]
pub(crate) struct Presented {
    session_cookies: Vec<String>,
    tokens: Vec<String>,
    tickets: Vec<String>,
    /// All cookies together, as one header has them.
    cookies: Vec<String>,
}

impl Presented {
    /// Reads a request. Subprotocols belong to WebSockets.
    pub(super) fn read(headers: &HeaderMap, is_websocket: bool, names: &Names) -> Self {
        let mut presented = Self::default();
        let all: Vec<_> = header_values(headers, &header::COOKIE).collect();
        for cookie in all.iter().flat_map(|header| Cookie::split_parse(*header)).flatten() {
            for (name, found) in [
                (&names.session_cookie, &mut presented.session_cookies),
                (&names.token_cookie, &mut presented.tokens),
            ] {
                if cookie.name() == name && found.len() < SAME_NAME_MAX {
                    found.push(cookie.value_trimmed().to_owned());
                }
            }
        }
        presented.cookies.extend((!all.is_empty()).then(|| all.join("; ")));
        // What was put there for this request alone comes first.
        presented.tokens.splice(0..0, bearer(headers).map(str::to_owned));
        if is_websocket {
            let protocols = header_values(headers, &header::SEC_WEBSOCKET_PROTOCOL);
            for protocol in protocols.flat_map(|value| value.split(',')).map(str::trim) {
                if let Some(ticket) = protocol.strip_prefix(TICKET_PREFIX) {
                    presented.tickets.push(ticket.to_owned());
                } else if let Some(token) = protocol.strip_prefix(TOKEN_PREFIX) {
                    presented.tokens.insert(0, token.to_owned());
                }
            }
            presented.tickets.truncate(1);
        }
        presented
    }

    /// What may be a credential of this way.
    pub(super) fn credentials(&self, way: WayName) -> &[String] {
        match way {
            WayName::RedisSession | WayName::SignedCookie => &self.session_cookies,
            WayName::Ticket => &self.tickets,
            WayName::Jwt => &self.tokens[..self.tokens.len().min(SAME_NAME_MAX)],
            WayName::Callback => &self.cookies,
        }
    }
}

fn header_values<'a>(headers: &'a HeaderMap, name: &'a HeaderName) -> impl Iterator<Item = &'a str> {
    headers.get_all(name).iter().filter_map(|value| value.to_str().ok())
}
