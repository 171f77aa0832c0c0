"""A client's message sealed for one aggregator, so that who taps the lines gets no shares.

Ephemeral X25519, HKDF-SHA256 and AES-256-GCM; the frame's header is authenticated with it. Whose
public keys are whose is the server's word, and who sent a message is not proven. No torch here.
"""

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

PUBLIC_BYTES = 32
OVERHEAD_BYTES = PUBLIC_BYTES + 16
"""The sender's public key, and the tag."""
NONCE = bytes(12)
"""Each key seals one message."""


class SealError(ValueError):
    """What arrived was not sealed for this aggregator, or was changed on its way."""


def public_of(key: X25519PrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)


def seal(data: bytes, receiver: bytes, header: bytes) -> bytes:
    own = X25519PrivateKey.generate()
    shared = own.exchange(X25519PublicKey.from_public_bytes(receiver))
    public = public_of(own)
    return public + AESGCM(_key(shared, public, receiver)).encrypt(NONCE, data, header)


def unseal(sealed: bytes, own: X25519PrivateKey, header: bytes) -> bytes:
    """What was sealed; SealError."""
    public, data = sealed[:PUBLIC_BYTES], sealed[PUBLIC_BYTES:]
    if len(sealed) < OVERHEAD_BYTES:
        raise SealError(f"a sealed message of {len(sealed)} bytes is too short to be one")
    try:
        shared = own.exchange(X25519PublicKey.from_public_bytes(public))
        return AESGCM(_key(shared, public, public_of(own))).decrypt(NONCE, data, header)
    except InvalidTag as error:
        raise SealError("it was not sealed for this aggregator, or was changed") from error
    except ValueError as error:  # a public key of low order
        raise SealError(f"its public key is none: {error}") from error


def _key(shared: bytes, sender: bytes, receiver: bytes) -> bytes:
    info = b"fedmi smpc aggregation" + sender + receiver
    return HKDF(SHA256(), 32, salt=None, info=info).derive(shared)
