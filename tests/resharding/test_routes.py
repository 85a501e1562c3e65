"""The route depends on the geometry and the policy."""

import jax
import pytest
from jax.sharding import NamedSharding, SingleDeviceSharding
from sharding_changes import P, mesh, move_of

from jaxshard.resharding.geometry import stays
from jaxshard.resharding.routes import choose


@pytest.mark.parametrize(
    ("target", "route", "kind"),
    [
        (lambda m: NamedSharding(m, P("b")), "device", "stay"),
        (lambda m: NamedSharding(mesh((4,), ("x",), [5, 4, 7, 6]), P("x")), "device", "copy"),
        (lambda m: NamedSharding(m, P(None, "b")), "device", "compiled"),
        (lambda m: NamedSharding(mesh((3,), ("x",), [0, 1, 2]), P("x")), "device", "pieces"),
        (lambda m: NamedSharding(m, P(None, "b")), "auto", "views"),
        (lambda m: SingleDeviceSharding(jax.devices()[0]), "auto", "views"),
        (lambda m: SingleDeviceSharding(jax.devices()[0]), "device", "pieces"),
    ],
)
def test_the_route_follows_from_the_geometry(target, route, kind):
    cube = mesh((2, 4), ("a", "b"), range(8))
    move = move_of(NamedSharding(cube, P("b")), target(cube))
    assert choose(move, route).kind == kind
    assert stays(move) == (kind == "stay")
