"""Eight CPU devices for every test that asks JAX, and a steady hypothesis."""

import os
import signal

from hypothesis import HealthCheck, settings
from mindspore_ranks import ranks, training

__all__ = ["ranks", "training"]  # fixtures

collect_ignore_glob = ["support/*"]  # programs and helpers, without tests or doctests

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")

settings.register_profile(
    "steady", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("steady")

# a shell's background jobs begin with Ctrl-C ignored, and what they start inherits that
signal.signal(signal.SIGINT, signal.default_int_handler)
