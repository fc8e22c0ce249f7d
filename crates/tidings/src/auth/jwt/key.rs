//! Keys that tokens are checked with: each knows what it may be used for, and no token can talk it into anything else.

use std::fmt;

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use pkcs1::{RsaPublicKeyRef, der::Decode as _};
use ring::{
    hmac,
    rsa::PublicKeyComponents,
    signature::{self, UnparsedPublicKey},
};
use serde_json::Value;
use spki::{ObjectIdentifier, SubjectPublicKeyInfoRef};

/// What a token can be signed with here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Algorithm {
    Hs256,
    Rs256,
    Rs384,
    Rs512,
    Ps256,
    Ps384,
    Ps512,
    Es256,
    Es384,
    EdDsa,
}

use Algorithm::{EdDsa, Es256, Es384, Hs256, Ps256, Ps384, Ps512, Rs256, Rs384, Rs512};

impl Algorithm {
    const ALL: [Self; 10] = [Hs256, Rs256, Rs384, Rs512, Ps256, Ps384, Ps512, Es256, Es384, EdDsa];

    /// As the header `alg` and the JWK parameter `alg` have it.
    pub(crate) fn named(name: &str) -> Option<Self> {
        // RFC 9864 has another name for the one curve of EdDSA that there is here.
        let name = if name == "Ed25519" { "EdDSA" } else { name };
        Self::ALL.into_iter().find(|algorithm| algorithm.name() == name)
    }

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Hs256 => "HS256",
            Rs256 => "RS256",
            Rs384 => "RS384",
            Rs512 => "RS512",
            Ps256 => "PS256",
            Ps384 => "PS384",
            Ps512 => "PS512",
            Es256 => "ES256",
            Es384 => "ES384",
            EdDsa => "EdDSA",
        }
    }

    /// Whether whoever can check a token could also make one.
    pub(crate) const fn is_symmetric(self) -> bool {
        matches!(self, Hs256)
    }
}

/// A key to check with.
#[derive(Clone)]
pub(crate) struct Key {
    material: Material,
    /// The one algorithm of those that the material could be used with; `None`: any of them.
    pinned: Option<Algorithm>,
}

#[derive(Clone)]
enum Material {
    Secret(hmac::Key),
    /// Both without leading zeros.
    Rsa(PublicKeyComponents<Vec<u8>>),
    /// A point of the curve, uncompressed.
    P256(Vec<u8>),
    P384(Vec<u8>),
    Ed25519(Vec<u8>),
}

/// What RSA keys ring checks with: shorter ones can be broken, and longer ones are work that an attacker orders.
const RSA_BITS: std::ops::RangeInclusive<usize> = 2048..=8192;

const RSA: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.1");
const ELLIPTIC_CURVE: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.2.1");
const P256: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.3.1.7");
const P384: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.132.0.34");
const ED25519: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.101.112");

const KINDS: &str =
    "expected an RSA key of 2048 to 8192 bits, one on the curve P-256 or P-384, or an Ed25519 one";

impl Key {
    pub(crate) fn secret(secret: &str) -> Self {
        Material::Secret(hmac::Key::new(hmac::HMAC_SHA256, secret.as_bytes())).into()
    }

    /// Reads public keys as PEM, one or more. Else what was expected.
    pub(crate) fn from_pem(text: &str) -> Result<Vec<Self>, String> {
        // Many a `.env` and container file can only have a line, and has `\n` for its ends.
        let text = text.replace("\\n", "\n");
        let blocks =
            pem::parse_many(&text).map_err(|_| "expected PEM, as in `-----BEGIN PUBLIC KEY-----`")?;
        // The reader passes over a block that does not end, and with it a key that somebody relies on.
        if blocks.is_empty() || blocks.len() != text.matches("-----BEGIN").count() {
            return Err(
                "expected PEM, from `-----BEGIN PUBLIC KEY-----` to `-----END PUBLIC KEY-----`".to_owned()
            );
        }
        blocks.iter().map(Self::from_block).collect()
    }

    fn from_block(block: &pem::Pem) -> Result<Self, String> {
        let unknown = || KINDS.to_owned();
        match block.tag() {
            "PUBLIC KEY" => Self::from_spki(block.contents()).ok_or_else(unknown),
            "RSA PUBLIC KEY" => Self::from_pkcs1(block.contents()).ok_or_else(unknown),
            "CERTIFICATE" => Err("this is a certificate; its key is what `openssl x509 -pubkey -noout` prints".to_owned()),
            private if private.ends_with("PRIVATE KEY") => Err(
                "this is a private key, which belongs to the issuer alone; its public one is what `openssl pkey -pubout` prints"
                    .to_owned(),
            ),
            _ => Err(unknown()),
        }
    }

    fn from_spki(der: &[u8]) -> Option<Self> {
        let info = SubjectPublicKeyInfoRef::from_der(der).ok()?;
        let key = info.subject_public_key.as_bytes()?;
        match info.algorithm.oid {
            RSA => Self::from_pkcs1(key),
            ELLIPTIC_CURVE => match info.algorithm.parameters_oid().ok()? {
                P256 => Self::p256(key.to_vec()),
                P384 => Self::p384(key.to_vec()),
                _ => None,
            },
            ED25519 => Self::ed25519(key.to_vec()),
            _ => None,
        }
    }

    fn from_pkcs1(der: &[u8]) -> Option<Self> {
        let key = RsaPublicKeyRef::from_der(der).ok()?;
        Self::rsa(key.modulus.as_bytes(), key.public_exponent.as_bytes())
    }

    /// Reads a key of a JSON Web Key Set, with its `kid`; `None`: it is not for checking signatures, or not one of ours.
    pub(crate) fn from_jwk(jwk: &Value) -> Option<(Option<String>, Self)> {
        let text = |name: &str| jwk.get(name).and_then(Value::as_str);
        let bytes = |name: &str| URL_SAFE_NO_PAD.decode(text(name)?).ok();
        let is_for_checking = match (jwk.get("use"), jwk.get("key_ops")) {
            (Some(usage), _) if usage != "sig" => false,
            (_, Some(operations)) => operations.as_array()?.iter().any(|operation| operation == "verify"),
            _ => true,
        };
        let mut key = match (text("kty")?, text("crv")) {
            // A secret that everybody can fetch is none, so `oct` is not among them.
            ("RSA", _) => Self::rsa(&bytes("n")?, &bytes("e")?)?,
            ("EC", Some("P-256")) => Self::p256(point(&bytes("x")?, &bytes("y")?))?,
            ("EC", Some("P-384")) => Self::p384(point(&bytes("x")?, &bytes("y")?))?,
            ("OKP", Some("Ed25519")) => Self::ed25519(bytes("x")?)?,
            _ => return None,
        };
        if let Some(name) = text("alg") {
            key.pinned = Some(Algorithm::named(name).filter(|algorithm| key.permits(*algorithm))?);
        }
        is_for_checking.then(|| (text("kid").map(str::to_owned), key))
    }

    fn rsa(modulus: &[u8], exponent: &[u8]) -> Option<Self> {
        let [n, e] = [modulus, exponent].map(|number| {
            let zeros = number.iter().take_while(|byte| **byte == 0).count();
            number[zeros..].to_vec()
        });
        let bits = n.len() * 8 - n.first()?.leading_zeros() as usize;
        (RSA_BITS.contains(&bits) && !e.is_empty())
            .then(|| Material::Rsa(PublicKeyComponents { n, e }).into())
    }

    fn p256(point: Vec<u8>) -> Option<Self> {
        (point.len() == 65 && point[0] == UNCOMPRESSED).then(|| Material::P256(point).into())
    }

    fn p384(point: Vec<u8>) -> Option<Self> {
        (point.len() == 97 && point[0] == UNCOMPRESSED).then(|| Material::P384(point).into())
    }

    fn ed25519(key: Vec<u8>) -> Option<Self> {
        (key.len() == 32).then(|| Material::Ed25519(key).into())
    }

    /// What it can be used with.
    pub(crate) fn algorithms(&self) -> impl Iterator<Item = Algorithm> {
        let all: &[Algorithm] = match &self.material {
            Material::Secret(_) => &[Hs256],
            Material::Rsa(_) => &[Rs256, Rs384, Rs512, Ps256, Ps384, Ps512],
            Material::P256(_) => &[Es256],
            Material::P384(_) => &[Es384],
            Material::Ed25519(_) => &[EdDsa],
        };
        all.iter().copied().filter(|algorithm| self.pinned.is_none_or(|pinned| pinned == *algorithm))
    }

    pub(crate) fn permits(&self, algorithm: Algorithm) -> bool {
        self.algorithms().any(|permitted| permitted == algorithm)
    }

    /// Whether the signature is this key's, of this message. Never with an algorithm that is not one of its own.
    pub(crate) fn verifies(&self, algorithm: Algorithm, message: &[u8], signature: &[u8]) -> bool {
        if !self.permits(algorithm) {
            return false;
        }
        let verified =
            match (&self.material, algorithm) {
                (Material::Secret(key), _) => hmac::verify(key, message, signature),
                (Material::Rsa(key), _) => {
                    let parameters = match algorithm {
                        Rs256 => &signature::RSA_PKCS1_2048_8192_SHA256,
                        Rs384 => &signature::RSA_PKCS1_2048_8192_SHA384,
                        Rs512 => &signature::RSA_PKCS1_2048_8192_SHA512,
                        Ps256 => &signature::RSA_PSS_2048_8192_SHA256,
                        Ps384 => &signature::RSA_PSS_2048_8192_SHA384,
                        Ps512 => &signature::RSA_PSS_2048_8192_SHA512,
                        _ => return false,
                    };
                    key.verify(parameters, message, signature)
                }
                (Material::P256(key), _) => UnparsedPublicKey::new(&signature::ECDSA_P256_SHA256_FIXED, key)
                    .verify(message, signature),
                (Material::P384(key), _) => UnparsedPublicKey::new(&signature::ECDSA_P384_SHA384_FIXED, key)
                    .verify(message, signature),
                (Material::Ed25519(key), _) => {
                    UnparsedPublicKey::new(&signature::ED25519, key).verify(message, signature)
                }
            };
        verified.is_ok()
    }
}

/// How a point begins that has both of its coordinates (SEC 1).
const UNCOMPRESSED: u8 = 4;

fn point(x: &[u8], y: &[u8]) -> Vec<u8> {
    // Coordinates have the length of the curve, zeros included; of two that are wrong, no sum may look right.
    if x.len() != y.len() {
        return Vec::new();
    }
    [&[UNCOMPRESSED], x, y].concat()
}

impl From<Material> for Key {
    fn from(material: Material) -> Self {
        Self { material, pinned: None }
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.algorithms()).finish()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{super::test_keys, *};

    fn names(keys: &[Key]) -> String {
        keys.iter().flat_map(Key::algorithms).map(Algorithm::name).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn a_public_key_is_used_with_its_own_algorithms_only() {
        let rsa = "RS256 RS384 RS512 PS256 PS384 PS512";
        for (pem, expected) in [
            (test_keys::RSA_PUBLIC, rsa),
            (test_keys::RSA_PKCS1_PUBLIC, rsa),
            (test_keys::P256_PUBLIC, "ES256"),
            (test_keys::P384_PUBLIC, "ES384"),
            (test_keys::ED25519_PUBLIC, "EdDSA"),
        ] {
            assert_eq!(names(&Key::from_pem(pem).unwrap()), expected);
            let in_one_line = pem.replace('\n', "\\n");
            assert_eq!(names(&Key::from_pem(&in_one_line).unwrap()), expected);
        }
        let several = [test_keys::P256_PUBLIC, "the former one:\n", test_keys::ED25519_PUBLIC].concat();
        assert_eq!(names(&Key::from_pem(&several).unwrap()), "ES256 EdDSA");
        assert_eq!(format!("{:?}", Key::secret("s3cret")), "[Hs256]");
    }

    #[test]
    fn what_is_no_public_key_is_explained() {
        for (text, words) in [
            ("", "expected PEM"),
            ("s3cret", "expected PEM"),
            ("-----BEGIN PUBLIC KEY-----\nrubbish\n-----END PUBLIC KEY-----", "expected"),
            ("-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----", "expected an RSA key"),
            (test_keys::RSA, "private key, which belongs to the issuer"),
            (test_keys::P256_SEC1, "private key, which belongs to the issuer"),
            (test_keys::RSA_1024_PUBLIC, "2048 to 8192 bits"),
            (test_keys::P521_PUBLIC, "P-256 or P-384"),
            ("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----", "openssl x509 -pubkey"),
            (&[test_keys::P256_PUBLIC, "-----BEGIN PUBLIC KEY-----\nMCow"].concat(), "expected PEM"),
        ] {
            let error = Key::from_pem(text).unwrap_err();
            assert!(error.contains(words), "{text}: {error}");
        }
    }

    #[test]
    fn a_key_of_a_set_is_pinned_to_its_algorithm_and_only_those_for_signatures_count() {
        let x = URL_SAFE_NO_PAD.encode([7; 32]);
        let okp = json!({"kty": "OKP", "crv": "Ed25519", "x": x, "kid": "k"});
        let modulus = URL_SAFE_NO_PAD.encode([&[0][..], &[0xff; 256]].concat());
        let rsa = json!({"kty": "RSA", "n": modulus, "e": "AQAB", "kid": "k"});
        let with = |jwk: &Value, more: &Value| {
            let mut jwk = jwk.clone();
            jwk.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            Key::from_jwk(&jwk).map(|(_, key)| names(&[key]))
        };
        for (jwk, more, expected) in [
            (&okp, json!({}), Some("EdDSA")),
            (&okp, json!({"alg": "Ed25519"}), Some("EdDSA")),
            (&okp, json!({"key_ops": ["verify"]}), Some("EdDSA")),
            (&okp, json!({"use": "sig"}), Some("EdDSA")),
            (&okp, json!({"use": "enc"}), None),
            (&okp, json!({"use": 7}), None),
            (&okp, json!({"key_ops": ["encrypt"]}), None),
            (&okp, json!({"crv": "X25519"}), None),
            (&okp, json!({"x": "AAAA"}), None),
            (&rsa, json!({}), Some("RS256 RS384 RS512 PS256 PS384 PS512")),
            (&rsa, json!({"alg": "RS256"}), Some("RS256")),
            (&rsa, json!({"alg": "HS256"}), None),
            (&rsa, json!({"alg": "none"}), None),
            (&rsa, json!({"alg": "RSA-OAEP"}), None),
            (&rsa, json!({"kty": "oct", "k": "AAAAAAAAAAAAAAAAAAAAAA"}), None),
            (&rsa, json!({"n": "AQAB"}), None),
            (&rsa, json!({"n": ""}), None),
            (&rsa, json!({"kty": "EC", "crv": "P-256", "x": x, "y": x}), Some("ES256")),
            (&rsa, json!({"kty": "EC", "crv": "P-256", "x": modulus, "y": x}), None),
            (&rsa, json!({"kty": "EC", "crv": "P-521", "x": x, "y": x}), None),
        ] {
            assert_eq!(with(jwk, &more).as_deref(), expected, "{more}");
        }
        assert!(Key::from_jwk(&json!("k")).is_none());
    }
}
