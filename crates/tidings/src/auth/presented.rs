//! What a request shows to say whose it is.

use axum::http::{HeaderMap, HeaderName, header};
use cookie::Cookie;

use super::WayName;

/// The subprotocols that carry a credential, because a browser lets a page set nothing else on a WebSocket.
const TICKET_PREFIX: &str = "tidings.ticket.";

/// Cookies of one name that are looked at: a browser may send one for each path and domain.
const SAME_NAME_MAX: usize = 4;

/// Under which names credentials come.
#[derive(Clone, Debug)]
pub(super) struct Names {
    pub(super) session_cookie: String,
}

/// The credentials of a request, by the ways that may know them.
#[derive(Default)]
pub(crate) struct Presented {
    session_cookies: Vec<String>,
    tickets: Vec<String>,
}

impl Presented {
    /// Reads a request. Subprotocols belong to WebSockets.
    pub(super) fn read(headers: &HeaderMap, is_websocket: bool, names: &Names) -> Self {
        let cookies = header_values(headers, &header::COOKIE);
        let mut presented = Self::default();
        for cookie in cookies.flat_map(Cookie::split_parse).flatten() {
            if cookie.name() == names.session_cookie {
                presented.session_cookies.push(cookie.value_trimmed().to_owned());
            }
        }
        presented.session_cookies.truncate(SAME_NAME_MAX);
        if is_websocket {
            let protocols = header_values(headers, &header::SEC_WEBSOCKET_PROTOCOL);
            for protocol in protocols.flat_map(|value| value.split(',')).map(str::trim) {
                if let Some(ticket) = protocol.strip_prefix(TICKET_PREFIX) {
                    presented.tickets.push(ticket.to_owned());
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
            WayName::Jwt | WayName::Callback => &[],
        }
    }
}

fn header_values<'a>(headers: &'a HeaderMap, name: &'a HeaderName) -> impl Iterator<Item = &'a str> {
    headers.get_all(name).iter().filter_map(|value| value.to_str().ok())
}
