//! The body of a request: limited in size and in time.

use std::time::Duration;

use axum::{body::Body, http::StatusCode};
use futures_util::StreamExt as _;
use serde::de::DeserializeOwned;
use tokio::time::timeout;

use super::problem::Problem;

/// For all of a body to arrive. The largest that we take needs 280 kB a second for that; who drips one is cut off.
const TIMEOUT: Duration = Duration::from_mins(1);
/// What says something to the service itself is smaller than this.
const DOCUMENT_BYTES_MAX: usize = 1024 * 1024;
/// A body that is too large is read on up to so many times its limit, and thrown away: who is still sending does not read an
/// answer, and would find a reset connection in its place.
const DISCARDED_MAX: usize = 4;

/// Reads all of it, up to `bytes_max`.
pub(super) async fn read(body: Body, bytes_max: usize) -> Result<Vec<u8>, Problem> {
    timeout(TIMEOUT, read_to_end(body, bytes_max)).await.unwrap_or_else(|_| {
        let seconds = TIMEOUT.as_secs();
        Err(Problem::too_slow(&format!("the body has to arrive within {seconds} seconds; send less at once")))
    })
}

/// Reads a small document; `expected` shows what it has.
pub(super) async fn read_json<T: DeserializeOwned>(body: Body, expected: &str) -> Result<T, Problem> {
    let body = read(body, DOCUMENT_BYTES_MAX).await?;
    serde_json::from_slice(&body).map_err(|error| {
        Problem::new(StatusCode::UNPROCESSABLE_ENTITY, format!("expected {expected} as JSON: {error}"))
    })
}

async fn read_to_end(body: Body, bytes_max: usize) -> Result<Vec<u8>, Problem> {
    let (mut stream, mut bytes, mut length) = (body.into_data_stream(), Vec::new(), 0);
    while let Some(chunk) = stream.next().await {
        let chunk =
            chunk.map_err(|_| Problem::new(StatusCode::BAD_REQUEST, "the body cannot be read to its end"))?;
        length += chunk.len();
        if length <= bytes_max {
            bytes.extend_from_slice(&chunk);
        } else if length > DISCARDED_MAX * bytes_max {
            break;
        } else {
            bytes = Vec::new();
        }
    }
    if length > bytes_max {
        let detail = format!("at most {bytes_max} bytes are accepted in one request; send several");
        return Err(Problem::new(StatusCode::PAYLOAD_TOO_LARGE, detail));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use axum::response::IntoResponse as _;
    use futures_util::stream;
    use tokio::time::{Instant, sleep};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_body_that_is_dripped_is_cut_off() {
        let begun = Instant::now();
        let drops = stream::unfold((), |()| async {
            sleep(Duration::from_secs(5)).await;
            Some((Ok::<_, Infallible>("x"), ()))
        });
        let problem = read(Body::from_stream(drops), 1000).await.unwrap_err();
        assert_eq!(begun.elapsed(), TIMEOUT);
        let response = problem.into_response();
        assert_eq!(
            (response.status().as_u16(), &response.headers()["connection"]),
            (408, &"close".parse().unwrap())
        );
    }

    #[tokio::test]
    async fn a_body_is_read_up_to_its_limit() {
        assert_eq!(read(Body::from("abc"), 3).await.unwrap(), b"abc");
        assert_eq!(read(Body::from("abcd"), 3).await.unwrap_err().into_response().status().as_u16(), 413);
    }
}
