"""Compiles jaxshard/native/kernels.c when jaxshard is installed, if there is a C compiler.

Without one, or if it fails, the installation goes on: everything works with NumPy, too.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from contextlib import suppress
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_FOLDER = Path("jaxshard", "native")
_FLAGS = ["-std=gnu11", "-O3", "-fPIC", "-shared", "-fno-math-errno", "-ffp-contract=fast"]


class CompiledLoops(BuildHookInterface):
    """Puts the compiled loops beside their source, and into the wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and say what is in the wheel."""
        source, made = (Path(self.root, _FOLDER, f"kernels.{x}") for x in ("c", "so"))
        why_not = _compile(source, made)
        if why_not:
            with suppress(OSError):  # where nothing can be written, nothing old is used either
                made.unlink(missing_ok=True)
            self.app.display_warning(f"jaxshard's loops are not compiled, NumPy is used: {why_not}")
            return
        build_data["artifacts"].append(str(_FOLDER / made.name))
        build_data["pure_python"] = False
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"


def _compile(source: Path, made: Path) -> str:
    """Compile ``source`` to ``made``, which whoever uses it now keeps; why not, if it fails."""
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if compiler is None:
        return "no C compiler was found"
    new = made.with_suffix(".new")
    command = [*compiler.split(), *_FLAGS, str(source), "-o", str(new)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        return f"{compiler}: {error.strerror}"
    if done.returncode:
        with suppress(OSError):
            new.unlink(missing_ok=True)
        lines = (done.stderr.strip() or f"{compiler} failed").splitlines()
        return next((line for line in lines if "error" in line), lines[0])
    new.replace(made)
    return ""
