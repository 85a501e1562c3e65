"""MindSpore's encrypted ``.ckpt`` files: blocks and ciphers.

    d8 5e 3a 7f | tag 16 | total 4 | 16 4 | iv 16 | n 4 | n bytes      AES-GCM, as often as needed
    d9 5e 3a 7f |          total 4 | 16 4 | iv 16 | n 4 | n bytes      AES-CBC; SM4-CBC with da

Numbers are little-endian; ``total`` counts what follows it. Of the 16 bytes of a GCM block's
iv OpenSSL uses 12. The ciphers are those of the package ``cryptography``, which is needed for
nothing else. This module knows blocks and nothing of what is in them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ..errors import FormatError, LayoutError, StorageError
from .reader import Folder
from .sniff import kind_of

_MAGIC = {
    b"\xd8\x5e\x3a\x7f": "AES-GCM",
    b"\xd9\x5e\x3a\x7f": "AES-CBC",
    b"\xda\x5e\x3a\x7f": "SM4-CBC",
}
_KEY_BYTES = {"AES-GCM": (16, 24, 32), "AES-CBC": (16, 24, 32), "SM4-CBC": (16,)}
_TAG_BYTES, _IV_BYTES, _GCM_IV_BYTES = 16, 16, 12
_MAX_BLOCK_BYTES = (64 << 20) + 16  # MindSpore cuts the plain file every 64 MiB


class _Block(NamedTuple):
    cipher: str
    tag: bytes
    iv: bytes
    data: bytes
    stop: int


def decrypted(folder: Folder, path: str, key: bytes) -> Iterator[bytes]:
    """The plain file that is encrypted in the one at ``path``, in blocks.

    Raises:
        LayoutError: the file is not encrypted, or its cipher has no keys of that length.
        FormatError: a block is damaged, or the key is another one.
        StorageError: the package ``cryptography`` is missing.
        NotFoundError: there is no such file.
    """
    kind = kind_of(folder, path)
    if kind not in _KEY_BYTES:
        raise LayoutError(f"{path} is not encrypted. Use it as it is.")
    if len(key) not in _KEY_BYTES[kind]:
        lengths = " or ".join(map(str, _KEY_BYTES[kind]))
        raise LayoutError(f"the key has {len(key)} bytes; {kind} takes {lengths}.")
    at, end = 0, folder.files()[path].num_bytes
    while at < end:
        block = _block(folder, path, at, end)
        yield _plain(block, key, f"{path}, byte {at}")
        at = block.stop


def _block(folder: Folder, path: str, start: int, end: int) -> _Block:
    """The block at byte ``start``."""
    at = start

    def take(length: int) -> bytes:
        nonlocal at
        if length > end - at:
            raise FormatError(f"{path}, byte {start}: a block is cut short. Fetch the file again.")
        at += length
        return folder.read(path, at - length, length)

    def number() -> int:
        return int.from_bytes(take(4), "little")

    cipher = _MAGIC.get(take(4), "")
    tag = take(_TAG_BYTES) if cipher == "AES-GCM" else b""
    total, iv_bytes = number(), number()
    iv = take(min(iv_bytes, _IV_BYTES))
    length = number()
    if not cipher or iv_bytes != _IV_BYTES or total != 8 + iv_bytes + length:
        raise FormatError(f"{path}, byte {start}: no block of a cipher. Fetch the file again.")
    if length > _MAX_BLOCK_BYTES:
        raise FormatError(f"{path}, byte {start}: a block of {length} bytes. Fetch the file again.")
    return _Block(cipher, tag, iv, take(length), at)


def _plain(block: _Block, key: bytes, where: str) -> bytes:
    try:
        from cryptography.exceptions import InvalidTag  # noqa: PLC0415 - needed for nothing else
        from cryptography.hazmat.primitives import padding  # noqa: PLC0415
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes  # noqa: PLC0415
    except ImportError:
        raise StorageError(
            "the package cryptography is not installed, which decrypts. Install "
            "jaxshard[encrypted], or decrypt in MindSpore."
        ) from None

    try:
        if block.cipher == "AES-GCM":
            mode = modes.GCM(block.iv[:_GCM_IV_BYTES], block.tag)
            checked = Cipher(algorithms.AES(key), mode).decryptor()
            return bytes(checked.update(block.data) + checked.finalize())
        algorithm = algorithms.AES(key) if block.cipher == "AES-CBC" else algorithms.SM4(key)
        padded = Cipher(algorithm, modes.CBC(block.iv)).decryptor()
        plain = padding.PKCS7(128).unpadder()
        return bytes(plain.update(padded.update(block.data) + padded.finalize()) + plain.finalize())
    except (InvalidTag, ValueError):
        raise FormatError(
            f"{where}: the key does not fit, or the block is damaged. Try the right key, or fetch "
            "the file again."
        ) from None
