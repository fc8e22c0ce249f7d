//! JSON as Python writes it, which is not always JSON: `NaN`, unpaired surrogates, nesting without end. Pure.

use std::{borrow::Cow, io::Read as _};

use flate2::read::ZlibDecoder;
use serde::de::IgnoredAny;
use serde_json::Value;

/// Deeper nesting is replaced by `null`. Parsers give up at 128, and the event around a value needs some of it.
const DEPTH_MAX: usize = 64;
/// A message that unpacks to more is not read.
const UNPACKED_BYTES_MAX: u64 = 64 * 1024 * 1024;
/// What Celery 5.7 puts before a compressed result. The label says gzip, the stream is zlib's.
const COMPRESSED: &[u8] = b"\0celery-compressed\0application/x-gzip\0";
/// Where the state is looked for in what cannot be read: it is the first member of every result.
const HEAD_BYTES: usize = 64;

/// The text of a message; `None`: it is no JSON, and cannot be made any.
pub(super) fn text_of(bytes: &[u8]) -> Option<Cow<'_, str>> {
    let text = match bytes.strip_prefix(COMPRESSED) {
        Some(packed) => Cow::Owned(String::from_utf8_lossy(&unpacked(packed)?).into_owned()),
        None => String::from_utf8_lossy(bytes),
    };
    // Only looked at: this does not recurse.
    if serde_json::from_str::<IgnoredAny>(&text).is_ok() {
        return Some(text);
    }
    let mended = mended(&text);
    serde_json::from_str::<IgnoredAny>(&mended).is_ok().then_some(Cow::Owned(mended))
}

fn unpacked(packed: &[u8]) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    ZlibDecoder::new(packed).take(UNPACKED_BYTES_MAX + 1).read_to_end(&mut bytes).ok()?;
    (bytes.len() as u64 <= UNPACKED_BYTES_MAX).then_some(bytes)
}

/// A value within a message.
pub(super) fn value_of(json: &str) -> Option<Value> {
    serde_json::from_str(json).ok().or_else(|| serde_json::from_str(&mended(json)).ok())
}

/// The same with what no strict parser takes replaced: other numbers and deep nesting by `null`, unpaired surrogates by U+FFFD.
pub(super) fn mended(json: &str) -> String {
    let mut mended = String::with_capacity(json.len());
    let (mut rest, mut depth) = (json, 0_usize);
    while let Some(first) = rest.chars().next() {
        let (taken, replaced) = match first {
            '"' => {
                let length = string_length(rest);
                (length, with_whole_surrogates(&rest[..length]))
            }
            '{' | '[' => {
                depth += 1;
                (1, Cow::Borrowed(if depth == DEPTH_MAX + 1 { "null" } else { &rest[..1] }))
            }
            '}' | ']' => {
                depth = depth.saturating_sub(1);
                (1, Cow::Borrowed(if depth == DEPTH_MAX { "" } else { &rest[..1] }))
            }
            _ => match ["NaN", "-Infinity", "Infinity"].into_iter().find(|word| rest.starts_with(word)) {
                Some(word) => (word.len(), Cow::Borrowed("null")),
                None => (first.len_utf8(), Cow::Borrowed(&rest[..first.len_utf8()])),
            },
        };
        // The bracket that is too deep has been replaced, and that it is closed, too.
        let is_replacement = matches!(first, '{' | '[') && depth == DEPTH_MAX + 1;
        let is_end = matches!(first, '}' | ']') && depth == DEPTH_MAX;
        if depth <= DEPTH_MAX || is_replacement || is_end {
            mended.push_str(&replaced);
        }
        rest = &rest[taken..];
    }
    mended
}

/// The length of the string that `text` begins with, its quotes included.
fn string_length(text: &str) -> usize {
    let mut is_escaped = false;
    for (place, byte) in text.bytes().enumerate().skip(1) {
        match byte {
            _ if is_escaped => is_escaped = false,
            b'\\' => is_escaped = true,
            b'"' => return place + 1,
            _ => {}
        }
    }
    text.len()
}

/// A string with its quotes, in which every `\ud800` to `\udfff` has its other half.
fn with_whole_surrogates(string: &str) -> Cow<'_, str> {
    if !string.contains("\\u") {
        return Cow::Borrowed(string);
    }
    let mut whole = String::with_capacity(string.len());
    let mut rest = string;
    while let Some(place) = rest.find('\\') {
        let (before, escape) = rest.split_at(place);
        whole.push_str(before);
        let unit = |text: &str| {
            let digits = text.strip_prefix("\\u").and_then(|text| text.get(..4))?;
            u16::from_str_radix(digits, 16).ok()
        };
        let taken = match (unit(escape), escape.get(6..).and_then(unit)) {
            (Some(0xD800..=0xDBFF), Some(0xDC00..=0xDFFF)) => {
                whole.push_str(&escape[..12]);
                12
            }
            (Some(0xD800..=0xDFFF), _) => {
                whole.push_str("\\ufffd");
                6
            }
            _ => {
                // The escape and what it escapes, whatever its length is.
                let length = escape.char_indices().nth(2).map_or(escape.len(), |(place, _)| place);
                whole.push_str(&escape[..length]);
                length
            }
        };
        rest = &escape[taken..];
    }
    whole.push_str(rest);
    Cow::Owned(whole)
}

/// The state in the head of a result that cannot be read: the first member of every result, however it is written. In JSON it
/// follows `"status": "`, in MessagePack and in pickles (which are never unpickled) `status` and a byte or three that say how long
/// it is.
pub(super) fn status_in_head(bytes: &[u8]) -> Option<&str> {
    const KEY: &[u8] = b"status";
    let head = &bytes[..bytes.len().min(HEAD_BYTES)];
    let behind = head.windows(KEY.len()).position(|window| window == KEY)? + KEY.len();
    let begin = behind + head[behind..].iter().take(6).position(u8::is_ascii_uppercase)?;
    let length = head[begin..].iter().take_while(|byte| byte.is_ascii_uppercase() || **byte == b'_').count();
    // One that goes on behind the head is none of Celery's own.
    (begin + length < HEAD_BYTES).then(|| std::str::from_utf8(&head[begin..begin + length]).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_python_writes_and_no_strict_parser_takes_is_mended() {
        for (python, expected) in [
            (r#"{"a": NaN, "b": [Infinity, -Infinity, -1]}"#, r#"{"a": null, "b": [null, null, -1]}"#),
            (r#"{"a": "NaN Infinity"}"#, r#"{"a": "NaN Infinity"}"#),
            (
                r#"["\ud800", "\ud83d\ude00", "\udc00\ud800x", "\\ud800"]"#,
                r#"["\ufffd", "\ud83d\ude00", "\ufffd\ufffdx", "\\ud800"]"#,
            ),
            (r#"["a\"NaN", "\\"]"#, r#"["a\"NaN", "\\"]"#),
        ] {
            assert_eq!(mended(python), expected);
        }
        let deep = format!("{{\"x\": {}1{}, \"y\": 2}}", "[".repeat(500), "]".repeat(500));
        let value = value_of(&deep).expect("it can be read");
        assert_eq!(value["y"], 2);
        assert!(text_of(b"\x80\x04\x95status").is_none() && text_of(b"{\"a\": }").is_none());
        assert_eq!(text_of(b"\"\xff\"").as_deref(), Some("\"\u{fffd}\""));
    }

    #[test]
    fn a_compressed_message_is_unpacked_up_to_a_limit() {
        use std::io::Write as _;
        let pack = |bytes: &[u8]| {
            let mut packer =
                flate2::write::ZlibEncoder::new(COMPRESSED.to_vec(), flate2::Compression::fast());
            packer.write_all(bytes).expect("a vector takes everything");
            packer.finish().expect("a vector takes everything")
        };
        assert_eq!(text_of(&pack(br#"{"status": "SUCCESS"}"#)).as_deref(), Some(r#"{"status": "SUCCESS"}"#));
        let bomb = vec![b' '; usize::try_from(UNPACKED_BYTES_MAX).expect("it fits") + 1];
        assert!(text_of(&pack(&bomb)).is_none());
        assert!(text_of(&[COMPRESSED, b"x"].concat()).is_none());
    }

    #[test]
    fn the_state_is_found_in_the_head_of_what_cannot_be_read() {
        let pickle =
            b"\x80\x04\x95u\0\0\0\0\0\0\0}\x94(\x8c\x06status\x94\x8c\x07SUCCESS\x94\x8c\x06result\x94";
        for (bytes, status) in [
            (&pickle[..], Some("SUCCESS")),
            (b"\x89\xa6status\xa7FAILURE\xa6result\xc0", Some("FAILURE")),
            (b"{\"status\": \"MY_STATE\", \"result\": \"SUCCESS", Some("MY_STATE")),
            (b"\x80\x04\x95\0\0\0\0\0\0\0\0}\x94\x8c\x06result\x94\x8c\x07SUCCESS", None),
            (b"children: []\ndate_done: null\n", None),
            (b"", None),
        ] {
            assert_eq!(status_in_head(bytes), status);
        }
    }

    proptest! {
        #[test]
        fn nothing_makes_it_panic_and_json_stays_as_it_is(bytes: Vec<u8>, value in json()) {
            let _ = text_of(&bytes);
            let _ = mended(&String::from_utf8_lossy(&bytes));
            let _ = status_in_head(&bytes);
            let text = value.to_string();
            prop_assert_eq!(mended(&text), text);
        }
    }

    fn json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            any::<i64>().prop_map(Value::from),
            "[a-z\"\\\\{}\\[\\]N]{0,8}".prop_map(Value::from)
        ];
        leaf.prop_recursive(4, 32, 4, |inner| prop::collection::vec(inner, 0..4).prop_map(Value::from))
    }
}
