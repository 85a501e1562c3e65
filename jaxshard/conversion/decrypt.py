"""Decryption of MindSpore's encrypted ``.ckpt`` files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ..errors import FormatError, LayoutError, StorageError
from ..formats import mindspore_ckpt
from ..formats.folder import Folder, kind_of
from ..storage.local import LocalFolder
from ..storage.staging import os_errors_as
from ..storage.transaction import Transaction
from .open import PathLike


def decrypt(
    source: PathLike, destination: PathLike, key: bytes, *, overwrite: bool = False
) -> Path:
    """Decrypt the ``.ckpt`` at ``source`` to ``destination``.

    The result is published atomically. 64 MiB of it are in memory at a time.

    Args:
        source: a file that MindSpore wrote with ``enc_key``.
        destination: the file to write.
        key: the bytes of ``enc_key``; the cipher is read from the file.
        overwrite: replace an existing weight file.

    Raises:
        LayoutError: the source is not encrypted, or the destination exists and may not be
            replaced, or was created meanwhile.
        FormatError: the key is wrong, or the file is damaged.
        StorageError: the filesystem fails, or the package ``cryptography`` is missing.
    """
    place, folder = Path(destination), LocalFolder(source)
    name = os.path.basename(os.fspath(source))
    try:
        _refuse_source(place, source)
        staging = Transaction(
            place, "a decrypted file", overwrite=overwrite, only=place.name, resumable=False
        )
        try:
            plain = staging.files / place.name
            with os_errors_as(f"{place} cannot be written"), open(plain, "wb") as file:
                for block in decrypted(folder, name, key):
                    file.write(block)
            _check(plain, name)
            staging.finish(plain.name, plain.stat().st_size)
            staging.publish()
        except BaseException:
            staging.abandon()
            raise
    finally:
        folder.close()
    return place


def _refuse_source(place: Path, source: PathLike) -> None:
    if place.exists() and os.path.samefile(place, source):
        raise LayoutError(f"{place} is the encrypted file itself. Choose another name.")


def _check(plain: Path, name: str) -> None:
    """Check that the result is a weight file: some ciphers accept a wrong key."""
    folder = LocalFolder(plain)
    try:
        mindspore_ckpt.read_header(folder, plain.name)
    except FormatError:
        raise FormatError(f"{name}: decryption produced invalid data. Check the key.") from None
    finally:
        folder.close()


# --- MindSpore's encrypted ``.ckpt`` files: blocks and ciphers

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
    """Yield the decrypted blocks of the file at ``path``.

    Raises:
        LayoutError: the file is not encrypted, or its cipher needs another key length.
        FormatError: a block is damaged, or the key is wrong.
        StorageError: the package ``cryptography`` is missing.
        NotFoundError: there is no such file.
    """
    kind = kind_of(folder, path)
    if kind not in _KEY_BYTES:
        raise LayoutError(f"{path} is not encrypted. Use it without decryption.")
    if len(key) not in _KEY_BYTES[kind]:
        lengths = " or ".join(map(str, _KEY_BYTES[kind]))
        raise LayoutError(
            f"the key has {len(key)} bytes (expected {lengths} for {kind}). Check the key."
        )
    at, end = 0, folder.files()[path].num_bytes
    while at < end:
        block = _block(folder, path, at, end)
        yield _plain(block, key, f"{path}, byte {at}")
        at = block.stop


def _block(folder: Folder, path: str, start: int, end: int) -> _Block:
    """Read the block at byte ``start``."""
    at = start

    def take(length: int) -> bytes:
        nonlocal at
        if length > end - at:
            raise FormatError(f"{path}, byte {start}: truncated block. Fetch the file again.")
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
        raise FormatError(f"{path}, byte {start}: not an encrypted block. Fetch the file again.")
    if length > _MAX_BLOCK_BYTES:
        raise FormatError(f"{path}, byte {start}: a block of {length} bytes. Fetch the file again.")
    return _Block(cipher, tag, iv, take(length), at)


def _plain(block: _Block, key: bytes, where: str) -> bytes:
    try:
        from cryptography.exceptions import InvalidTag  # noqa: PLC0415 - only to decrypt
        from cryptography.hazmat.primitives import padding  # noqa: PLC0415
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes  # noqa: PLC0415
    except ImportError:
        raise StorageError(
            "decryption needs the package cryptography, which is not installed. Install "
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
            f"{where}: the key is wrong, or the block is damaged. Check the key, or fetch the file "
            "again."
        ) from None
