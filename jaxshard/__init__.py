"""jaxshard: model weights between any two layouts, on disks and on devices.

    import jaxshard as js

    ckpt = js.open("qwen2_7b/")               # any format; headers only
    params = js.load(ckpt, "dp2mp4")          # {name: jax.Array}
    params = js.reshard(params, "dp4mp2")     # on the devices
    js.save(params, "out/")                   # standard files, without gathering
    js.convert("src/", "dst/", to="mp4")      # file to file

Importing this module imports neither JAX nor NumPy: every name is fetched when it is
first used.
"""

from __future__ import annotations

from .core.lazy_imports import lazy_getattr

_HOME = {
    "Catalog": "core.catalog",
    "CheckpointManager": "training",
    "CoverageError": "errors",
    "FormatError": "errors",
    "JaxshardError": "errors",
    "Layout": "core.layout",
    "Mapping": "mapping",
    "LayoutError": "errors",
    "NotFoundError": "errors",
    "Options": "conversion.options",
    "Placement": "core.layout",
    "Rules": "rules",
    "StorageError": "errors",
    "Strategy": "core.strategy",
    "convert": "api",
    "gather": "api",
    "load": "loader",
    "load_rank": "conversion.load_rank",
    "merge": "api",
    "merge_lora": "lora",
    "mesh": "devices.mesh",
    "open": "api",
    "plan": "api",
    "prepare_reshard": "api",
    "read_rules": "rules",
    "reshard": "api",
    "save": "saver",
    "slice": "api",
    "stage_meshes": "devices.mesh",
    "verify": "api",
}

__all__ = list(_HOME)
__version__ = "0.1.0"

__getattr__ = lazy_getattr(__name__, _HOME)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
