"""On one GPU: every byte there and back, by the ways that only GPUs take.

Skipped where JAX finds no GPU. Everything runs in a process of its own, as the other tests
have told JAX of eight CPU devices.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parents[1] / "support"


def on_gpu(*tests: str, platforms: str = "cuda,cpu") -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "JAX_NUM_CPU_DEVICES"}
    environment |= {
        "JAX_PLATFORMS": platforms,
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)]),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    command = [sys.executable, str(HERE / "gpu_checks.py"), *tests]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="no NVIDIA GPU here")
@pytest.mark.parametrize("platforms", ["cuda,cpu", "cuda"])
def test_what_one_gpu_can_show(platforms, tmp_path):
    done = on_gpu(str(tmp_path), platforms=platforms)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)


def test_the_same_checks_hold_on_a_cpu_device(tmp_path):
    done = on_gpu(str(tmp_path), platforms="cpu")
    assert done.returncode == 0, done.stdout + done.stderr
