//! Making tokens, for development: the service itself only checks them.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use ring::{
    hmac,
    rand::SystemRandom,
    signature::{self, EcdsaKeyPair, Ed25519KeyPair, RsaKeyPair},
};
use serde_json::{Value, json};

use super::Algorithm;

/// A key that tokens can be signed with.
pub(crate) enum Signer {
    Secret(hmac::Key),
    Rsa(Box<RsaKeyPair>),
    EllipticCurve(Algorithm, EcdsaKeyPair),
    Ed25519(Ed25519KeyPair),
}

/// Why nothing could be signed: ring does not say.
#[derive(Debug, thiserror::Error)]
#[error("the key cannot sign")]
pub(crate) struct CannotSign;

const PRIVATE_KEY: &str = "expected a private key as PEM, unencrypted: RSA, P-256, P-384 or Ed25519; `openssl pkcs8 -topk8 -nocrypt` makes one of other forms";

impl Signer {
    pub(crate) fn secret(secret: &str) -> Self {
        Self::Secret(hmac::Key::new(hmac::HMAC_SHA256, secret.as_bytes()))
    }

    /// Reads a private key. Else what was expected.
    pub(crate) fn from_pem(text: &str) -> Result<Self, &'static str> {
        let block = pem::parse(text).map_err(|_| PRIVATE_KEY)?;
        let der = block.contents();
        if block.tag() == "RSA PRIVATE KEY" {
            return RsaKeyPair::from_der(der).map(|key| Self::Rsa(Box::new(key))).map_err(|_| PRIVATE_KEY);
        }
        let random = SystemRandom::new();
        let p256 = || EcdsaKeyPair::from_pkcs8(&signature::ECDSA_P256_SHA256_FIXED_SIGNING, der, &random);
        let p384 = || EcdsaKeyPair::from_pkcs8(&signature::ECDSA_P384_SHA384_FIXED_SIGNING, der, &random);
        RsaKeyPair::from_pkcs8(der)
            .map(|key| Self::Rsa(Box::new(key)))
            .or_else(|_| p256().map(|key| Self::EllipticCurve(Algorithm::Es256, key)))
            .or_else(|_| p384().map(|key| Self::EllipticCurve(Algorithm::Es384, key)))
            .or_else(|_| Ed25519KeyPair::from_pkcs8_maybe_unchecked(der).map(Self::Ed25519))
            .map_err(|_| PRIVATE_KEY)
    }

    fn algorithm(&self) -> Algorithm {
        match self {
            Self::Secret(_) => Algorithm::Hs256,
            Self::Rsa(_) => Algorithm::Rs256,
            Self::EllipticCurve(algorithm, _) => *algorithm,
            Self::Ed25519(_) => Algorithm::EdDsa,
        }
    }

    /// A token that says this.
    pub(crate) fn token(&self, claims: &Value) -> Result<String, CannotSign> {
        self.with_header(&json!({"alg": self.algorithm().name(), "typ": "JWT"}), claims)
    }

    /// A token with a header of the caller's, whatever it says.
    pub(super) fn with_header(&self, header: &Value, claims: &Value) -> Result<String, CannotSign> {
        let [header, claims] = [header, claims].map(|part| URL_SAFE_NO_PAD.encode(part.to_string()));
        let message = format!("{header}.{claims}");
        let signature = self.sign(message.as_bytes())?;
        Ok(format!("{message}.{}", URL_SAFE_NO_PAD.encode(signature)))
    }

    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, CannotSign> {
        let random = SystemRandom::new();
        Ok(match self {
            Self::Secret(key) => hmac::sign(key, message).as_ref().to_vec(),
            Self::Rsa(key) => {
                let mut signature = vec![0; key.public().modulus_len()];
                key.sign(&signature::RSA_PKCS1_SHA256, &random, message, &mut signature)
                    .map_err(|_| CannotSign)?;
                signature
            }
            Self::EllipticCurve(_, key) => {
                key.sign(&random, message).map_err(|_| CannotSign)?.as_ref().to_vec()
            }
            Self::Ed25519(key) => key.sign(message).as_ref().to_vec(),
        })
    }
}
