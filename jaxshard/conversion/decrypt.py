"""Decryption of MindSpore's encrypted ``.ckpt`` files."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import FormatError, LayoutError
from ..formats import mindspore_ckpt, mindspore_encryption
from ..storage.local import LocalFolder
from ..storage.transaction import Staging, told
from .open import PathLike


def decrypt(
    source: PathLike, destination: PathLike, key: bytes, *, overwrite: bool = False
) -> Path:
    """Make ``destination``, a plain ``.ckpt``, of the encrypted one at ``source``.

    It appears whole or not at all. 64 MiB of it are in memory at a time.

    Args:
        source: a file that MindSpore wrote with ``enc_key``.
        destination: the file to make.
        key: the bytes that were ``enc_key``; the cipher is seen from the file.
        overwrite: replace an existing weight file.

    Raises:
        LayoutError: the source is not encrypted, or the destination exists and may not be
            replaced, or appeared meanwhile.
        FormatError: the key is another one, or the file is damaged.
        StorageError: the disk refused, or the package ``cryptography`` is missing.
    """
    place, folder = Path(destination), LocalFolder(source)
    name = os.path.basename(os.fspath(source))
    try:
        _refuse_source(place, source)
        staging = Staging(
            place, "a decrypted file", overwrite=overwrite, only=place.name, resumable=False
        )
        try:
            plain = staging.files / place.name
            with told(f"{place} cannot be written"), open(plain, "wb") as file:
                for block in mindspore_encryption.decrypted(folder, name, key):
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
    """A wrong key gives bytes too, in some ciphers, but no weight file."""
    folder = LocalFolder(plain)
    try:
        mindspore_ckpt.read_header(folder, plain.name)
    except FormatError:
        raise FormatError(
            f"{name}: what the key makes of it is no weight file. Try the right key."
        ) from None
    finally:
        folder.close()
