"""What each of several processes does in the tests of saving by other names."""

from __future__ import annotations

from pathlib import Path

from jaxshard import loader, saver


def save_as_hugging_face(index, count, source, out):
    """Save stacked arrays as Hugging Face's, and Hugging Face's fused; the bytes written."""
    stacked = loader.load(source, "dp1mp4", names="hf:nnx-scan")
    how = {"extras": source, "fsync": False}
    hf = saver.save(stacked, Path(out) / "hf", names="llama-nnx-scan:llama-hf", **how)
    plain = loader.load(source, "dp2mp2")
    ranks = saver.save(plain, Path(out) / "ranks", format="ranks", names="hf:mcore-fused", **how)
    return {"hf": hf.counts.bytes_written, "ranks": ranks.counts.bytes_written}
