"""jaxshard: model weights between any two layouts, on disks and on devices.

    import jaxshard as js

    ckpt = js.open("qwen2_7b/")               # any format; headers only
    params = js.load(ckpt, "dp2mp4")          # {name: jax.Array}
    params = js.reshard(params, "dp4mp2")     # on the devices
    js.save(params, "out/")                   # standard files, without gathering
    js.convert("src/", "dst/", to="mp4")      # file to file

Importing this module imports neither JAX nor NumPy: each name is imported on first access.
"""

from __future__ import annotations

from .core import lazy_getattr

TYPE_CHECKING = False  # as in typing, whose import takes longer than all else here
if TYPE_CHECKING:  # for type checkers and editors; at run time each name is imported when used
    from .api import (
        convert,
        gather,
        load,
        load_rank,
        merge,
        merge_lora,
        mesh,
        open,
        plan,
        prepare_reshard,
        read_rules,
        register_models,
        reshard,
        save,
        show,
        slice,
        stage_meshes,
        verify,
    )
    from .core.catalog import Catalog
    from .core.layout import Layout, Placement, Strategy
    from .core.runtime import clear_caches
    from .errors import (
        CoverageError,
        FormatError,
        JaxshardError,
        LayoutError,
        NotFoundError,
        StorageError,
    )
    from .mapping import Mapping
    from .rules import Rules
    from .training import CheckpointManager

__all__ = [
    "Catalog",
    "CheckpointManager",
    "CoverageError",
    "FormatError",
    "JaxshardError",
    "Layout",
    "LayoutError",
    "Mapping",
    "NotFoundError",
    "Placement",
    "Rules",
    "StorageError",
    "Strategy",
    "clear_caches",
    "convert",
    "gather",
    "load",
    "load_rank",
    "merge",
    "merge_lora",
    "mesh",
    "open",
    "plan",
    "prepare_reshard",
    "read_rules",
    "register_models",
    "reshard",
    "save",
    "show",
    "slice",
    "stage_meshes",
    "verify",
]
__version__ = "0.1.0"

_HOME = dict.fromkeys(__all__, "api") | {
    "Catalog": "core.catalog",
    "CheckpointManager": "training",
    "Layout": "core.layout",
    "Mapping": "mapping",
    "Placement": "core.layout",
    "Rules": "rules",
    "Strategy": "core.layout",
    "clear_caches": "core.runtime",
    "load": "loader",
    "load_rank": "conversion.load_rank",
    "merge_lora": "lora",
    "mesh": "devices.mesh",
    "read_rules": "rules",
    "register_models": "models",
    "save": "saver",
    "show": "devices.pytree",
    "stage_meshes": "devices.mesh",
    **{name: "errors" for name in __all__ if name.endswith("Error")},
}

if not TYPE_CHECKING:  # without it, type checkers refuse unknown names
    __getattr__ = lazy_getattr(__name__, _HOME)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
