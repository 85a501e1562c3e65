"""Encrypted weight files become what MindSpore would have written without a key."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import mindspore_files as ms
import pytest
from golden_files import golden

from jaxshard.cli import main
from jaxshard.conversion.decrypt import decrypt
from jaxshard.errors import FormatError, LayoutError, StorageError

KEY = b"0123456789ABCDEF"
CIPHERS = ("AES-GCM", "AES-CBC", "SM4-CBC")


def encrypted(cipher: str) -> Path:
    pytest.importorskip("cryptography")
    return golden("ckpt_formats", f"enc_{cipher}.ckpt")


@pytest.mark.parametrize("cipher", CIPHERS)
def test_what_was_encrypted_is_the_plain_file(cipher: str, tmp_path: Path) -> None:
    decrypt(encrypted(cipher), tmp_path / "plain.ckpt", KEY)
    assert ms.weights(tmp_path / "plain.ckpt") == ms.weights(
        golden("ckpt_formats", "all_dtypes.ckpt")
    )
    assert [p.name for p in tmp_path.iterdir()] == ["plain.ckpt"]


def block(plain: bytes) -> bytes:
    """``plain`` as one block of AES-GCM."""
    ciphers = pytest.importorskip("cryptography.hazmat.primitives.ciphers")
    iv = bytes(range(16))
    encryptor = ciphers.Cipher(ciphers.algorithms.AES(KEY), ciphers.modes.GCM(iv[:12])).encryptor()
    data = encryptor.update(plain) + encryptor.finalize()
    sizes = [n.to_bytes(4, "little") for n in (24 + len(data), 16, len(data))]
    return b"\xd8\x5e\x3a\x7f" + encryptor.tag + sizes[0] + sizes[1] + iv + sizes[2] + data


def test_a_file_of_several_blocks_is_put_together(tmp_path: Path) -> None:
    """MindSpore cuts the plain file every 64 MiB."""
    plain = golden("ckpt_formats", "all_dtypes.ckpt").read_bytes()
    parts = [plain[:1000], plain[1000:1001], plain[1001:]]
    (tmp_path / "three.ckpt").write_bytes(b"".join(map(block, parts)))
    decrypt(tmp_path / "three.ckpt", tmp_path / "plain.ckpt", KEY)
    assert (tmp_path / "plain.ckpt").read_bytes() == plain


def test_blocks_that_are_cut_short_or_no_blocks_are_refused(tmp_path: Path) -> None:
    one = encrypted("AES-GCM").read_bytes()
    (tmp_path / "two.ckpt").write_bytes(one * 2)
    with pytest.raises(FormatError, match="invalid data"):  # every name is there twice
        decrypt(tmp_path / "two.ckpt", tmp_path / "plain.ckpt", KEY)
    for number, crash in enumerate((one + one[:7], one + b"\n" + one, one[:-1])):
        source = tmp_path / f"{number}.ckpt"
        source.write_bytes(crash)
        with pytest.raises(FormatError, match=r"byte \d+: (truncated|a block|not an encrypted)"):
            decrypt(source, tmp_path / "plain.ckpt", KEY)
    assert not (tmp_path / "plain.ckpt").exists()


@pytest.mark.parametrize("cipher", CIPHERS)
def test_a_wrong_key_and_a_damaged_block_make_nothing(cipher: str, tmp_path: Path) -> None:
    source = tmp_path / "source.ckpt"
    shutil.copy(encrypted(cipher), source)
    with pytest.raises(FormatError, match="key"):
        decrypt(source, tmp_path / "plain.ckpt", KEY[::-1])
    data = bytearray(source.read_bytes())
    data[60] ^= 1  # the first bytes of what is encrypted
    source.write_bytes(data)
    with pytest.raises(FormatError, match="key"):
        decrypt(source, tmp_path / "plain.ckpt", KEY)
    with pytest.raises(LayoutError, match=r"the key has 5 bytes .expected 16"):
        decrypt(source, tmp_path / "plain.ckpt", b"short")
    assert [p.name for p in tmp_path.iterdir()] == ["source.ckpt"]


def test_the_command_takes_the_key_from_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    key, out = tmp_path / "key", tmp_path / "plain.ckpt"
    key.write_bytes(KEY + b"\n")
    command = ["decrypt", str(encrypted("AES-CBC")), str(out), "--key-file"]
    assert main([*command, str(tmp_path / "nowhere")]) == 2
    assert main([*command, str(key)]) == 0
    assert "plain.ckpt" in capsys.readouterr().out
    assert main([*command, str(key)]) == 2  # it exists
    assert main([*command, str(key), "--overwrite", "--quiet"]) == 0
    assert main(["inspect", str(out)]) == 0
    capsys.readouterr()


def test_a_plain_file_is_no_encrypted_one(tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match="is not encrypted"):
        decrypt(golden("ckpt_formats", "all_dtypes.ckpt"), tmp_path / "o", KEY)


def test_the_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.exceptions", None)
    with pytest.raises(StorageError, match=r"Install jaxshard\[encrypted\]"):
        decrypt(golden("ckpt_formats", "enc_AES-GCM.ckpt"), tmp_path / "o", KEY)
    assert not list(tmp_path.iterdir())
