//! Tokens of all kinds, made here and elsewhere, honest and not.

use std::time::Duration;

use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::{
    auth::outside::{Outside, Reply, later},
    config::{Flags, Layers, Settings},
};

const NOW: i64 = 1_800_000_000;

fn now() -> Timestamp {
    at(NOW)
}

fn at(seconds: i64) -> Timestamp {
    Timestamp::from_microsecond(seconds * 1_000_000).unwrap()
}

fn jwt(variables: &[(&str, &str)]) -> Jwt {
    let variables = variables.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())).collect();
    let settings = Settings::read(&Layers::load(&Flags::default(), &variables, None).unwrap()).unwrap();
    Jwt::new(&settings.auth.jwt.unwrap())
}

fn with_secret() -> Jwt {
    jwt(&[("TIDINGS_JWT_SECRET", test_keys::SECRET)])
}

fn claims(more: &Value) -> Value {
    let mut claims = json!({"sub": "u1", "projects": ["p1", "team-a/*"], "exp": NOW + 60});
    for (name, value) in more.as_object().unwrap() {
        claims[name] = value.clone();
    }
    claims
}

fn signed(more: &Value) -> String {
    Signer::secret(test_keys::SECRET).token(&claims(more)).unwrap()
}

fn signer(pem: &str) -> Signer {
    Signer::from_pem(pem).unwrap()
}

async fn identity(jwt: &Jwt, token: &str) -> Identity {
    let checked = jwt.check(token, now()).await.unwrap_or_else(|refusal| panic!("{token}: {refusal:?}"));
    assert_eq!(checked.valid_until, None);
    checked.identity
}

async fn denied(jwt: &Jwt, token: &str) -> Denied {
    match jwt.check(token, now()).await {
        Err(Refusal::Denied(denied)) => denied,
        other => panic!("{token}: {other:?}"),
    }
}

async fn code(jwt: &Jwt, token: &str) -> &'static str {
    denied(jwt, token).await.code
}

async fn no_verdict(jwt: &Jwt, token: &str) -> String {
    match jwt.check(token, now()).await {
        Err(Refusal::NoVerdict(words)) => words,
        other => panic!("{token}: {other:?}"),
    }
}

#[tokio::test]
async fn a_token_says_whose_it_is_and_what_he_may_see_until_its_end() {
    let token = signed(&json!({"iat": NOW - 5, "admin": true, "nbf": NOW}));
    let who = identity(&with_secret(), &token).await;
    let expected = Identity {
        user: user(&json!("u1")).unwrap(),
        projects: Projects::listed(&["p1", "team-a/*"]),
        admin: true,
        expires_at: Some(at(NOW + 60)),
        issued_at: Some(at(NOW - 5)),
    };
    assert_eq!(who, expected);
    let token = signed(
        &json!({"sub": 7, "projects": "*", "admin": null, "nbf": null, "aud": null, "exp": 1_800_000_000.5}),
    );
    let who = identity(&with_secret(), &token).await;
    assert_eq!((who.user.as_str(), who.projects.is_everything(), who.admin), ("7", true, false));
    let token = signed(&json!({"projects": null}));
    assert_eq!(identity(&with_secret(), &token).await.projects, Projects::none());
}

#[tokio::test]
async fn tokens_that_another_library_made_are_accepted_with_each_algorithm() {
    let keys =
        [test_keys::RSA_PUBLIC, test_keys::P256_PUBLIC, test_keys::P384_PUBLIC, test_keys::ED25519_PUBLIC];
    let jwt = jwt(&[("TIDINGS_JWT_SECRET", test_keys::SECRET), ("TIDINGS_JWT_PUBLIC_KEY", &keys.concat())]);
    for (algorithm, token) in test_keys::FOREIGN {
        assert_eq!(identity(&jwt, token).await.user.as_str(), "u1", "{algorithm}");
    }
}

#[tokio::test]
async fn a_token_of_each_kind_of_private_key_is_accepted_with_its_public_one() {
    for (private, public) in [
        (test_keys::RSA, test_keys::RSA_PUBLIC),
        (test_keys::RSA_PKCS1, test_keys::RSA_PKCS1_PUBLIC),
        (test_keys::P256, test_keys::P256_PUBLIC),
        (test_keys::P384, test_keys::P384_PUBLIC),
        (test_keys::ED25519, test_keys::ED25519_PUBLIC),
    ] {
        let token = signer(private).token(&claims(&json!({}))).unwrap();
        identity(&jwt(&[("TIDINGS_JWT_PUBLIC_KEY", public)]), &token).await;
    }
    for other in [test_keys::P256_SEC1, test_keys::RSA_PUBLIC, "rubbish"] {
        assert!(Signer::from_pem(other).is_err_and(|words| words.contains("openssl pkcs8")));
    }
}

#[tokio::test]
async fn each_of_several_keys_is_tried_while_one_replaces_another() {
    let secrets = ["a-newer-secret-of-the-tests", test_keys::SECRET].join(",");
    identity(&jwt(&[("TIDINGS_JWT_SECRET", &secrets)]), &signed(&json!({}))).await;
    let other = Signer::secret("another-secret-of-the-tests").token(&claims(&json!({}))).unwrap();
    assert_eq!(code(&with_secret(), &other).await, "signature");
}

#[tokio::test]
async fn the_key_says_the_algorithm_and_the_token_does_not() {
    let rsa = jwt(&[("TIDINGS_JWT_PUBLIC_KEY", test_keys::RSA_PUBLIC)]);
    // The classic: the public key, which everybody has, as the secret.
    let public = Signer::secret(test_keys::RSA_PUBLIC).token(&claims(&json!({}))).unwrap();
    assert_eq!(code(&rsa, &public).await, "algorithm");
    let both =
        jwt(&[("TIDINGS_JWT_SECRET", test_keys::SECRET), ("TIDINGS_JWT_PUBLIC_KEY", test_keys::RSA_PUBLIC)]);
    assert_eq!(code(&both, &public).await, "signature");
    let p256 = signer(test_keys::P256);
    assert_eq!(code(&rsa, &p256.token(&claims(&json!({}))).unwrap()).await, "algorithm");
    for (name, expected) in [
        ("none", "algorithm"),
        ("None", "algorithm"),
        ("NONE", "algorithm"),
        ("", "algorithm"),
        ("hs256", "algorithm"),
        ("HS512", "algorithm"),
        ("ES512", "algorithm"),
        ("RS256", "signature"),
        ("PS512", "signature"),
    ] {
        let token = p256.with_header(&json!({"alg": name}), &claims(&json!({}))).unwrap();
        assert_eq!(code(&rsa, &token).await, expected, "{name}");
        let unsigned = format!("{}.", token.rsplit_once('.').unwrap().0);
        assert_eq!(code(&rsa, &unsigned).await, expected, "{name}");
    }
    // A good signature under another algorithm's name, of the same key and of the same curve.
    let message = test_keys::FOREIGN.iter().find(|(name, _)| *name == "RS256").unwrap().1;
    let (_, rest) = message.split_once('.').unwrap();
    let header = URL_SAFE_NO_PAD.encode(r#"{"alg":"RS384"}"#);
    assert_eq!(code(&rsa, &format!("{header}.{rest}")).await, "signature");
    let detail = denied(&rsa, &public).await.detail;
    assert!(detail.contains("HS256") && detail.contains("set TIDINGS_JWT_SECRET"), "{detail}");
}

#[tokio::test]
async fn keys_that_a_token_brings_along_are_not_looked_at() {
    let outside = Outside::start(Reply::json(&json!({"keys": []}))).await;
    let jwt = jwt(&[("TIDINGS_JWT_PUBLIC_KEY", test_keys::P256_PUBLIC)]);
    let own = signer(test_keys::ED25519);
    for more in [
        json!({"jku": outside.url()}),
        json!({"x5u": outside.url()}),
        json!({"kid": outside.url()}),
        json!({"kid": "../../../../dev/null"}),
        json!({"jwk": {"kty": "OKP", "crv": "Ed25519", "x": "9E8HQNoQXEt1svPNSWM5-Hzzz1d1xmoE-0EZHTfKGh0"}}),
    ] {
        let mut header = more.clone();
        header["alg"] = json!("EdDSA");
        let token = own.with_header(&header, &claims(&json!({}))).unwrap();
        assert_eq!(code(&jwt, &token).await, "algorithm", "{more}");
    }
    assert_eq!(outside.asked(), 0);
}

#[tokio::test]
async fn what_is_no_token_is_told_apart_from_a_bad_one() {
    let jwt = with_secret();
    let good = signed(&json!({}));
    let secret = Signer::secret(test_keys::SECRET);
    let header = |header: Value| secret.with_header(&header, &claims(&json!({}))).unwrap();
    let encoded = |text: &str| URL_SAFE_NO_PAD.encode(text);
    for (token, words) in [
        (String::new(), "three parts"),
        ("a.b".to_owned(), "three parts"),
        ("a.b.c.d".to_owned(), "three parts"),
        (format!("{good}.x.y"), "only signed"),
        (format!("{good}.a.b.c.d.e"), "three parts"),
        (format!("{}.e30.", encoded("[]")), "first part"),
        (format!("{}.e30.", encoded("\u{0}")), "first part"),
        (format!("{good}="), "third part"),
        (format!(" {good}"), "first part"),
        (good.replace('.', "=."), "first part"),
        (header(json!({"alg": "HS256", "crit": ["exp"]})), "`crit`"),
        (header(json!({"alg": "HS256", "crit": null})), "`crit`"),
        (header(json!({"alg": "HS256", "kid": 7})), "`kid`"),
        (header(json!({"typ": "JWT"})), "`alg`"),
        (header(json!({"alg": ["HS256"]})), "`alg`"),
        (secret.token(&json!("u1")).unwrap(), "second part"),
        (secret.token(&json!([claims(&json!({}))])).unwrap(), "second part"),
        (signed(&json!({"more": "x".repeat(TOKEN_BYTES_MAX)})), "longer than 8192 bytes"),
    ] {
        let Denied { code, detail } = denied(&jwt, &token).await;
        assert_eq!(code, "token_malformed", "{token}: {detail}");
        assert!(detail.contains(words), "{token}: {detail}");
    }
}

#[tokio::test]
async fn a_claim_that_is_missing_or_mistyped_lets_nobody_in() {
    for (more, code, words) in [
        (json!({"exp": null}), "claims", "`exp`"),
        (json!({"exp": (NOW + 60).to_string()}), "claims", "expected a number"),
        (json!({"exp": "2099-01-01T00:00:00Z"}), "claims", "expected a number"),
        (json!({"exp": [NOW + 60]}), "claims", "expected a number"),
        (json!({"exp": true}), "claims", "expected a number"),
        (json!({"exp": 1e300}), "claims", "expected a number"),
        (json!({"exp": u64::MAX}), "claims", "expected a number"),
        (json!({"exp": NOW}), "expired", "2027-01-15T08:00:00"),
        (json!({"exp": NOW - 1}), "expired", "`exp`"),
        (json!({"exp": -1}), "expired", "`exp`"),
        (json!({"nbf": NOW + 1}), "not_yet_valid", "clocks"),
        (json!({"nbf": "0"}), "claims", "`nbf`"),
        (json!({"iat": "0"}), "claims", "`iat`"),
        (json!({"sub": null}), "no_user", "`sub`"),
        (json!({"sub": ""}), "claims", "`sub`"),
        (json!({"sub": {"id": 1}}), "claims", "`sub`"),
        (json!({"projects": "p1"}), "claims", "`projects`"),
        (json!({"projects": [1]}), "claims", "`projects`"),
        (json!({"admin": "true"}), "claims", "`admin`"),
        (json!({"aud": "tidings"}), "audience", "set it to what `aud` says"),
        (json!({"aud": []}), "audience", "TIDINGS_JWT_AUDIENCE is not set"),
        (json!({"aud": 1}), "claims", "`aud`"),
        (json!({"aud": ["a", 1]}), "claims", "`aud`"),
    ] {
        let denied = denied(&with_secret(), &signed(&more)).await;
        assert_eq!(denied.code, code, "{more}: {}", denied.detail);
        assert!(denied.detail.contains(words), "{more}: {}", denied.detail);
    }
}

#[tokio::test]
async fn issuer_and_audience_are_what_the_settings_say() {
    let jwt = jwt(&[
        ("TIDINGS_JWT_SECRET", test_keys::SECRET),
        ("TIDINGS_JWT_ISSUER", "https://id.example.com/"),
        ("TIDINGS_JWT_AUDIENCE", "tidings"),
    ]);
    let issuer = "https://id.example.com/";
    for aud in [json!("tidings"), json!(["else", "tidings"])] {
        identity(&jwt, &signed(&json!({"iss": issuer, "aud": aud}))).await;
    }
    for (more, expected) in [
        (json!({"aud": "tidings"}), "issuer"),
        (json!({"aud": "tidings", "iss": "https://id.example.com"}), "issuer"),
        (json!({"aud": "tidings", "iss": [issuer]}), "issuer"),
        (json!({"iss": issuer}), "audience"),
        (json!({"iss": issuer, "aud": "Tidings"}), "audience"),
        (json!({"iss": issuer, "aud": ["else"]}), "audience"),
    ] {
        assert_eq!(code(&jwt, &signed(&more)).await, expected, "{more}");
    }
}

proptest! {
    #[test]
    fn a_token_that_was_changed_anywhere_is_refused(place in any::<prop::sample::Index>(), letter in "[A-Za-z0-9_.-]") {
        let token = signed(&json!({}));
        let place = place.index(token.len());
        prop_assume!(token[place..=place] != letter);
        let changed = [&token[..place], &letter, &token[place + 1..]].concat();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        prop_assert!(runtime.block_on(with_secret().check(&changed, now())).is_err());
    }

    #[test]
    fn whatever_somebody_sends_is_refused_and_not_repeated(token in "[ -~]{0,80}|[a-zA-Z0-9_-]{8,40}\\.[a-zA-Z0-9_-]{8,40}\\.[a-zA-Z0-9_-]{0,40}") {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let refusal = runtime.block_on(with_secret().check(&token, now())).unwrap_err();
        let Refusal::Denied(denied) = refusal else { panic!("{refusal:?}") };
        prop_assert!(token.len() < 8 || !denied.detail.contains(&token));
        prop_assert!(!denied.detail.contains(test_keys::SECRET));
    }
}

/// A key set with the public part of each of these private keys, under its name.
fn key_set(keys: &[(&str, &str)]) -> Value {
    let jwk = |&(kid, pem): &(&str, &str)| {
        use ring::signature::KeyPair as _;
        let encode = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
        match signer(pem) {
            Signer::Rsa(key) => {
                let public = ring::rsa::PublicKeyComponents::<Vec<u8>>::from(key.public());
                json!({"kid": kid, "kty": "RSA", "n": encode(&public.n), "e": encode(&public.e), "alg": "RS256", "use": "sig"})
            }
            Signer::EllipticCurve(algorithm, key) => {
                let (x, y) = key.public_key().as_ref()[1..].split_at(key.public_key().as_ref().len() / 2);
                let curve = if algorithm == Algorithm::Es256 { "P-256" } else { "P-384" };
                json!({"kid": kid, "kty": "EC", "crv": curve, "x": encode(x), "y": encode(y)})
            }
            Signer::Ed25519(key) => {
                json!({"kid": kid, "kty": "OKP", "crv": "Ed25519", "x": encode(key.public_key().as_ref())})
            }
            Signer::Secret(_) => unreachable!(),
        }
    };
    json!({"keys": keys.iter().map(jwk).collect::<Vec<_>>()})
}

/// A token with this `kid`, signed with this key.
fn named(kid: &str, pem: &str) -> String {
    let algorithm = match signer(pem) {
        Signer::Rsa(_) => "RS256",
        Signer::EllipticCurve(algorithm, _) => algorithm.name(),
        _ => "EdDSA",
    };
    signer(pem).with_header(&json!({"alg": algorithm, "kid": kid}), &claims(&json!({}))).unwrap()
}

async fn publishing(keys: &[(&str, &str)]) -> (Outside, Jwt) {
    let outside = Outside::start(Reply::json(&key_set(keys))).await;
    let jwt = jwt(&[("TIDINGS_JWKS_URL", outside.url())]);
    (outside, jwt)
}

#[tokio::test]
async fn published_keys_are_fetched_once_and_found_by_their_name() {
    let keys =
        [("r", test_keys::RSA), ("e", test_keys::P256), ("f", test_keys::P384), ("d", test_keys::ED25519)];
    let (outside, jwt) = publishing(&keys).await;
    assert_eq!(outside.asked(), 0);
    for (kid, pem) in keys {
        identity(&jwt, &named(kid, pem)).await;
    }
    assert_eq!(outside.asked(), 1);
    assert!(!outside.request().to_lowercase().contains("cookie"), "{}", outside.request());
    // The key's algorithm and no other, another's name, another's signature under this name.
    let rs512 = signer(test_keys::RSA)
        .with_header(&json!({"alg": "RS512", "kid": "r"}), &claims(&json!({})))
        .unwrap();
    assert_eq!(code(&jwt, &rs512).await, "algorithm");
    assert_eq!(code(&jwt, &named("d", test_keys::P256)).await, "algorithm");
    let hs256 = Signer::secret(test_keys::RSA_PUBLIC)
        .with_header(&json!({"alg": "HS256", "kid": "r"}), &claims(&json!({})))
        .unwrap();
    assert_eq!(code(&jwt, &hs256).await, "algorithm");
    let forged = named("d", test_keys::ED25519);
    let forged = format!("{}.{}", forged.rsplit_once('.').unwrap().0, "A".repeat(86));
    assert_eq!(code(&jwt, &forged).await, "signature");
}

#[tokio::test]
async fn a_key_of_the_same_name_of_another_issuer_is_another_key() {
    let (_ours, jwt) = publishing(&[("k", test_keys::P256), ("other", test_keys::P384)]).await;
    let (_theirs, their_jwt) = publishing(&[("k", test_keys::ED25519)]).await;
    identity(&their_jwt, &named("k", test_keys::ED25519)).await;
    assert_eq!(code(&jwt, &named("k", test_keys::ED25519)).await, "algorithm");
    assert_eq!(code(&their_jwt, &named("k", test_keys::P256)).await, "algorithm");
    // Nor is a key of the same issuer under another one's name.
    assert_eq!(code(&jwt, &named("other", test_keys::P256)).await, "algorithm");
    identity(&jwt, &named("k", test_keys::P256)).await;
}

#[tokio::test]
async fn a_token_need_not_name_the_only_key() {
    let (outside, jwt) = publishing(&[("d", test_keys::ED25519)]).await;
    let unnamed = signer(test_keys::ED25519).token(&claims(&json!({}))).unwrap();
    identity(&jwt, &unnamed).await;
    outside.replies(Reply::json(&key_set(&[("d", test_keys::ED25519), ("e", test_keys::P256)])));
    later(Duration::from_mins(11)).await;
    identity(&jwt, &unnamed).await;
    until("the keys being fetched anew", || outside.asked() == 2).await;
    until("the keys being taken", || jwt.jwks.as_ref().unwrap().is_idle()).await;
    let Denied { code, detail } = denied(&jwt, &unnamed).await;
    assert_eq!(code, "unknown_key");
    assert!(detail.contains("let the issuer write `kid`"), "{detail}");
}

#[tokio::test]
async fn a_new_key_is_fetched_when_a_token_names_it_and_made_up_names_cost_one_fetch_in_30_seconds() {
    let (outside, jwt) = publishing(&[("old", test_keys::P256)]).await;
    identity(&jwt, &named("old", test_keys::P256)).await;
    later(Duration::from_secs(31)).await;
    outside.replies(Reply::json(&key_set(&[("old", test_keys::P256), ("new", test_keys::ED25519)])));
    identity(&jwt, &named("new", test_keys::ED25519)).await;
    assert_eq!(outside.asked(), 2);
    for round in 0..3 {
        for kid in 0..50 {
            let token = named(&format!("made-up-{kid}"), test_keys::P256);
            assert_eq!(code(&jwt, &token).await, "unknown_key");
        }
        assert_eq!(outside.asked(), 2 + round);
        later(Duration::from_secs(31)).await;
    }
    // Withdrawn is withdrawn.
    outside.replies(Reply::json(&key_set(&[("new", test_keys::ED25519)])));
    assert_eq!(code(&jwt, &named("made-up", test_keys::P256)).await, "unknown_key");
    assert_eq!(code(&jwt, &named("old", test_keys::P256)).await, "unknown_key");
    let hostile = "\u{1b}[31m\n\u{202e}".to_owned() + &"x".repeat(100);
    let detail = denied(&jwt, &named(&hostile, test_keys::P256)).await.detail;
    assert!(detail.contains("`\\u{1b}[31m\\n\\u{202e}xxx") && !detail.contains(&"x".repeat(40)), "{detail}");
}

#[tokio::test]
async fn many_who_wait_for_keys_wait_for_one_fetch() {
    let (outside, jwt) = publishing(&[("d", test_keys::ED25519)]).await;
    outside.replies(Reply::json(&key_set(&[("d", test_keys::ED25519)])).after(Duration::from_millis(500)));
    let token = named("d", test_keys::ED25519);
    // One who leaves meanwhile takes nothing with him.
    let impatient = tokio::time::timeout(Duration::from_millis(20), jwt.check(&token, now()));
    let (left, all) =
        tokio::join!(impatient, futures_util::future::join_all((0..200).map(|_| jwt.check(&token, now()))));
    assert!(left.is_err() && all.iter().all(Result::is_ok));
    assert_eq!(outside.asked(), 1);
}

#[tokio::test]
async fn keys_are_refreshed_behind_a_request_and_old_ones_serve_a_day_while_that_fails() {
    let (outside, jwt) = publishing(&[("d", test_keys::ED25519)]).await;
    let token = named("d", test_keys::ED25519);
    identity(&jwt, &token).await;
    outside.replies(Reply::json(&key_set(&[("d", test_keys::ED25519)])).after(Duration::from_secs(1)));
    later(Duration::from_mins(11)).await;
    let begun = tokio::time::Instant::now();
    identity(&jwt, &token).await;
    assert!(begun.elapsed() < Duration::from_millis(900), "it waited for the refresh");
    until("the refresh", || outside.asked() == 2 && jwt.jwks.as_ref().unwrap().is_idle()).await;
    outside.replies(Reply::hang_up());
    for hours in [1, 11, 11] {
        later(Duration::from_hours(hours)).await;
        identity(&jwt, &token).await;
        until("the refresh", || jwt.jwks.as_ref().unwrap().is_idle()).await;
    }
    // Whether an unknown one is good, nobody can say now.
    assert!(no_verdict(&jwt, &named("new", test_keys::P256)).await.contains("TIDINGS_JWKS_URL"));
    later(Duration::from_hours(2)).await;
    assert!(no_verdict(&jwt, &token).await.contains("cannot be reached"));
    outside.replies(Reply::json(&key_set(&[("d", test_keys::ED25519)])));
    later(Duration::from_secs(6)).await;
    identity(&jwt, &token).await;
}

#[tokio::test]
async fn an_issuer_that_answers_with_anything_else_gives_no_verdict() {
    let other = Outside::start(Reply::json(&key_set(&[("d", test_keys::ED25519)]))).await;
    let location = format!("location: {}\r\n", other.url());
    let key_set = key_set(&[("d", test_keys::ED25519)]).to_string();
    let large = format!("{}{}", " ".repeat(256 << 10), key_set);
    for (reply, words) in [
        (Reply::new("302 Found", &location, ""), "redirects are not followed"),
        (Reply::new("301 Moved Permanently", &location, &key_set), "redirects are not followed"),
        (Reply::status("404 Not Found"), "answers 404"),
        (Reply::status("503 Service Unavailable"), "answers 503"),
        (Reply::new("200 OK", "", large), "more than 262144 bytes"),
        (Reply::new("200 OK", "content-encoding: gzip\r\n", &key_set), "compressed"),
        (Reply::new("200 OK", "", "<html>"), "no key set"),
        (Reply::new("200 OK", "", "[]"), "no key set"),
        (Reply::new("200 OK", "", r#"{"keys": {}}"#), "no key set"),
        (Reply::hang_up(), "cannot be reached"),
        (Reply::status("200 OK").after(Duration::from_secs(3)), "does not answer within 2 s"),
    ] {
        let outside = Outside::start(reply).await;
        let jwt = jwt(&[("TIDINGS_JWKS_URL", outside.url())]);
        let token = named("d", test_keys::ED25519);
        let told = no_verdict(&jwt, &token).await;
        assert!(told.contains(words) && told.starts_with("TIDINGS_JWKS_URL"), "{words}: {told}");
        // Again at once: what was found out a moment ago is known.
        no_verdict(&jwt, &token).await;
        assert_eq!(outside.asked(), 1, "{words}");
    }
    assert_eq!(other.asked(), 0);
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let jwt = jwt(&[("TIDINGS_JWKS_URL", &format!("http://{nobody}/"))]);
    assert!(no_verdict(&jwt, &named("d", test_keys::P256)).await.contains("refused"));
}

#[tokio::test]
async fn what_is_no_key_for_signatures_is_passed_over() {
    let mut keys = key_set(&[("d", test_keys::ED25519)]);
    let list = keys["keys"].as_array_mut().unwrap();
    let secret = URL_SAFE_NO_PAD.encode(test_keys::SECRET);
    list.extend([
        json!({"kty": "oct", "kid": "o", "k": secret, "alg": "HS256"}),
        json!({"kty": "new"}),
        json!(7),
    ]);
    let outside = Outside::start(Reply::json(&keys)).await;
    let jwt = jwt(&[("TIDINGS_JWKS_URL", outside.url())]);
    identity(&jwt, &named("d", test_keys::ED25519)).await;
    let symmetric = Signer::secret(test_keys::SECRET)
        .with_header(&json!({"alg": "HS256", "kid": "o"}), &claims(&json!({})))
        .unwrap();
    assert_eq!(code(&jwt, &symmetric).await, "algorithm");
    assert_eq!(code(&jwt, &named("o", test_keys::P256)).await, "unknown_key");
}

#[tokio::test]
async fn keys_of_the_settings_are_good_beside_published_ones_and_need_no_fetch() {
    let outside = Outside::start(Reply::json(&key_set(&[("d", test_keys::ED25519)]))).await;
    let jwt = jwt(&[
        ("TIDINGS_JWKS_URL", outside.url()),
        ("TIDINGS_JWT_SECRET", test_keys::SECRET),
        ("TIDINGS_JWT_PUBLIC_KEY", test_keys::P256_PUBLIC),
    ]);
    identity(&jwt, &signed(&json!({}))).await;
    identity(&jwt, &named("whatever", test_keys::P256)).await;
    let other = Signer::secret("another-secret-of-the-tests").token(&claims(&json!({}))).unwrap();
    assert_eq!(code(&jwt, &other).await, "signature");
    assert_eq!(outside.asked(), 0);
    identity(&jwt, &named("d", test_keys::ED25519)).await;
    assert_eq!(outside.asked(), 1);
}

async fn until(what: &str, happens: impl Fn() -> bool) {
    let waiting = async {
        while !happens() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), waiting)
        .await
        .unwrap_or_else(|_| panic!("{what} did not happen"));
}
