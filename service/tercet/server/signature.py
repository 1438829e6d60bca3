"""Signatures: ed25519 (RFC 8032) over card.json, which holds the hashes of the other files. They are 64 bytes, as OpenSSL has them.

openssl genpkey -algorithm ed25519 -out private.pem
openssl pkey -in private.pem -pubout -out public.pem
"""

from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from tercet.card import SIGNATURE, read_card, verify_file
from tercet.errors import StartupError


def sign(folder: Path, key: Path) -> Path:
    """Sign a trained model with a private key; return the file with the signature.

    Raises StartupError when the model is not whole or the key is none.
    """
    card = read_card(folder)
    for name in card.files:
        verify_file(folder, card, name)
    private = _read_key(key)
    if not isinstance(private, Ed25519PrivateKey):
        raise StartupError(f"{key} is no private ed25519 key: make one with `openssl genpkey -algorithm ed25519`")
    path = folder / SIGNATURE
    path.write_bytes(private.sign((folder / "card.json").read_bytes()))
    return path


def check(content: bytes, folder: Path, key: Path) -> None:
    """Raise StartupError unless `content`, of card.json in a folder, is what the owner of a public key has signed."""
    public = _read_key(key)
    if not isinstance(public, Ed25519PublicKey):
        raise StartupError(f"require_signed: {key} is no public ed25519 key: `openssl pkey -in private.pem -pubout` writes one")
    path = folder / SIGNATURE
    try:
        public.verify(path.read_bytes(), content)
    except OSError:
        raise StartupError(f"{path} cannot be read, and what is not signed is not served: `tercet sign {folder}`") from None
    except InvalidSignature:
        raise StartupError(f"{path} is no signature of this card.json by the owner of {key}: it is not served") from None


def _read_key(path: Path) -> object:
    """A private or public key of any kind. Raises StartupError."""
    try:
        content = path.read_bytes()
        return load_pem_private_key(content, None) if b"PRIVATE" in content else load_pem_public_key(content)
    except OSError as error:
        raise StartupError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise StartupError(f"{path} is no key in a PEM file without a password: {error}") from error
