"""SM2 key pair of the dealer, and decryption of what the engine encrypts to it.

GB/T 32918.4: a ciphertext is a curve point C1, a hash C3 and the masked message C2, which the
engine (OpenSSL) writes as DER SEQUENCE { INTEGER x, INTEGER y, OCTET STRING C3, OCTET STRING C2 }.
The curve arithmetic is that of the `gmalg` library, whose key generator draws from the operating
system's cryptographic generator (`secrets`).
"""

import base64
from dataclasses import dataclass, field

from gmalg import SM2  # type: ignore[import-untyped]
from gmalg.errors import GMError  # type: ignore[import-untyped]

SEQUENCE, INTEGER, OCTETS = 0x30, 0x02, 0x04
COORDINATE_BYTES = 32
SPKI = bytes.fromhex("3059301306072a8648ce3d020106082a811ccf5501822d034200")
"""DER of SubjectPublicKeyInfo for an uncompressed point: id-ecPublicKey on 1.2.156.10197.1.301."""


class DecryptError(ValueError):
    """Not a ciphertext for this key."""


@dataclass(frozen=True)
class KeyPair:
    """secret: 32 bytes; public: the uncompressed point, 65 bytes."""

    secret: bytes = field(repr=False)
    public: bytes

    @classmethod
    def generate(cls) -> "KeyPair":
        secret, public = SM2().generate_keypair()
        return cls(secret, public)

    @property
    def pem(self) -> str:
        """The public key as the engine reads it."""
        text = base64.encodebytes(SPKI + self.public).decode()
        return f"-----BEGIN PUBLIC KEY-----\n{text}-----END PUBLIC KEY-----\n"

    def decrypt(self, ciphertext: bytes) -> bytes:
        """The message; DecryptError where it is malformed or was meant for another key."""
        x, y, digest, masked = _fields(ciphertext)
        point = b"\x04" + _coordinate(x) + _coordinate(y)
        try:
            return bytes(SM2(self.secret).decrypt(point + digest + masked))
        except (GMError, ValueError) as error:
            raise DecryptError(f"not encrypted to this dealer's key: {error}") from error


def _coordinate(value: bytes) -> bytes:
    number = int.from_bytes(value, "big", signed=True)
    if not 0 <= number < 1 << (8 * COORDINATE_BYTES):
        raise DecryptError("a coordinate is no number of 256 bits")
    return number.to_bytes(COORDINATE_BYTES, "big")


def _fields(der: bytes) -> tuple[bytes, bytes, bytes, bytes]:
    body, rest = _element(der, SEQUENCE)
    x, body = _element(body, INTEGER)
    y, body = _element(body, INTEGER)
    digest, body = _element(body, OCTETS)
    masked, body = _element(body, OCTETS)
    if rest or body:
        raise DecryptError(f"{len(rest) + len(body)} bytes are left over behind the ciphertext")
    return x, y, digest, masked


def _element(der: bytes, tag: int) -> tuple[bytes, bytes]:
    """Content of the first element, which must have this tag, and what follows it."""
    if len(der) < 2 or der[0] != tag:
        raise DecryptError(f"DER tag {der[:1].hex() or 'nothing'} where {tag:02x} was expected")
    size, start = der[1], 2
    if size & 0x80:
        start += size & 0x7F
        size = int.from_bytes(der[2:start], "big")
    if len(der) < start + size:
        raise DecryptError(f"a DER element of {size} bytes ends after {len(der) - start}")
    return der[start : start + size], der[start + size :]
