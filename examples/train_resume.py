"""Training that is killed and resumes in other layouts, with the same loss curve.

    python examples/train_resume.py [--steps 30] [--out FOLDER]

A small Llama (``llama.py``) is trained on 8 devices as dp2mp4, with optax's Adam. A separate
process does the same, saves every few steps in the background, and is killed by SIGKILL.
It is resumed three times from its checkpoints: as dp2mp4, as dp4mp2, and as pp2mp2dp2, with
each pipeline stage on half of the devices. The loss curves are compared with the curve of the
uninterrupted run, printed, and drawn to FOLDER/loss.svg.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
sys.path.insert(0, str(Path(__file__).parent))

import jax
import jax.numpy as jnp
import numpy as np
import optax  # not a dependency of jaxshard: any optimizer whose state is a pytree works
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from llama import Config, head, layer

import jaxshard as js
from jaxshard.devices.mesh import stage_meshes
from jaxshard.devices.pytree import shardings_by_rules
from jaxshard.rules import split_layers
from jaxshard.training import CheckpointManager

CONFIG = Config(2, heads=8, kv_heads=4, head_dim=8, eps=1e-5, rope_theta=1e4, tied=False)
HIDDEN, INNER, VOCAB, BATCH, LENGTH = 64, 128, 64, 32, 16
OPTIMIZER = optax.scale_by_adam()
RATE = 1e-2

State = dict[str, Any]
Arrays = dict[str, jax.Array]


def new_state(strategy: js.Strategy) -> State:
    """Create random weights in the layout of ``strategy``, and a fresh optimizer state."""
    chance = np.random.default_rng(0)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return chance.standard_normal((rows, columns), np.float32) / np.sqrt(columns)

    weights = {"model.embed_tokens.weight": matrix(VOCAB, HIDDEN)}
    kv = CONFIG.kv_heads * CONFIG.head_dim
    for number in range(CONFIG.layers):
        p = f"model.layers.{number}"
        weights |= {
            f"{p}.input_layernorm.weight": np.ones(HIDDEN, np.float32),
            f"{p}.self_attn.q_proj.weight": matrix(HIDDEN, HIDDEN),
            f"{p}.self_attn.k_proj.weight": matrix(kv, HIDDEN),
            f"{p}.self_attn.v_proj.weight": matrix(kv, HIDDEN),
            f"{p}.self_attn.o_proj.weight": matrix(HIDDEN, HIDDEN),
            f"{p}.post_attention_layernorm.weight": np.ones(HIDDEN, np.float32),
            f"{p}.mlp.gate_proj.weight": matrix(INNER, HIDDEN),
            f"{p}.mlp.up_proj.weight": matrix(INNER, HIDDEN),
            f"{p}.mlp.down_proj.weight": matrix(HIDDEN, INNER),
        }
    weights |= {
        "model.norm.weight": np.ones(HIDDEN, np.float32),
        "lm_head.weight": matrix(VOCAB, HIDDEN),
    }
    shardings = shardings_by_rules(weights, strategy)
    params = {name: jax.device_put(w, shardings[name]) for name, w in weights.items()}
    zeros = {name: jax.device_put(np.zeros_like(w), shardings[name]) for name, w in weights.items()}
    adam = optax.ScaleByAdamState(jnp.int32(0), zeros, jax.tree.map(jnp.copy, zeros))
    return {"params": params, "opt_state": adam, "key": jax.random.key(0)}


def batch(key: jax.Array) -> np.ndarray:
    """Generate sequences that count in different steps, which a model can learn."""
    starts, steps = jax.random.randint(key, (2, BATCH, 1), 1, VOCAB)
    return np.asarray((starts + (steps % 5) * np.arange(LENGTH + 1)) % VOCAB)


class Trainer:
    """A training step, on one mesh or on one mesh per pipeline stage."""

    def __init__(self, strategy: js.Strategy) -> None:
        self._meshes = stage_meshes(strategy)
        ends = np.cumsum([0, *split_layers(CONFIG.layers, strategy.pp)])
        ranges = [range(a, b) for a, b in pairwise(ends)]
        *inner, last = [_stage(layers) for layers in ranges]
        self._forward = [jax.jit(stage) for stage in inner]
        self._backward = [jax.jit(_backward_of(stage)) for stage in inner]
        self._loss = jax.jit(jax.value_and_grad(_loss_of(last), argnums=(0, 1), allow_int=True))
        self._update = jax.jit(_update, donate_argnums=(0, 1))

    def step(self, state: State) -> tuple[State, float]:
        """Train on one batch; return the new state and the loss. The old arrays are donated."""
        key, used = jax.random.split(state["key"])
        tokens = batch(used)
        given, wanted = tokens[:, :-1], tokens[:, 1:]
        held = [_held(state["params"], mesh) for mesh in self._meshes]
        inputs = [self._put(0, given)]
        for number, forward in enumerate(self._forward):
            inputs.append(self._put(number + 1, forward(held[number], inputs[number])))
        last = len(self._meshes) - 1
        loss, (grads, back) = self._loss(held[last], inputs[last], self._put(last, wanted))
        gradients = dict(grads)
        for number in reversed(range(last)):
            grads, back = self._backward[number](
                held[number], inputs[number], self._put(number, back)
            )
            gradients |= grads
        return {**self._updated(state, held, gradients), "key": key}, float(loss)

    def _put(self, stage: int, x: Any) -> jax.Array:
        """Place ``x`` on the devices of a stage, with the batch split over its replicas."""
        return jax.device_put(x, NamedSharding(self._meshes[stage], PartitionSpec("dp")))

    def _updated(self, state: State, held: list[Arrays], gradients: Arrays) -> State:
        before: optax.ScaleByAdamState = state["opt_state"]
        params, mu, nu = {}, {}, {}
        for mine in held:
            # a copy of the count per stage, because it is donated and not committed to a device
            adam = optax.ScaleByAdamState(
                jnp.copy(before.count), *({n: m[n] for n in mine} for m in (before.mu, before.nu))
            )
            found, after = self._update(mine, adam, {n: gradients[n] for n in mine})
            params |= found
            mu |= after.mu
            nu |= after.nu
        return {"params": params, "opt_state": optax.ScaleByAdamState(before.count + 1, mu, nu)}


def _stage(layers: range) -> Callable[[Mapping[str, jax.Array], jax.Array], jax.Array]:
    def stage(weights: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
        if layers[0] == 0:
            x = weights["model.embed_tokens.weight"][x]
        for number in layers:
            x = layer(x, weights, number, CONFIG)
        return head(x, weights, CONFIG) if layers[-1] == CONFIG.layers - 1 else x

    return stage


def _loss_of(stage: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    def loss(weights: Arrays, x: jax.Array, wanted: jax.Array) -> jax.Array:
        said = jax.nn.log_softmax(stage(weights, x))
        return -jnp.take_along_axis(said, wanted[..., None], -1).mean()

    return loss


def _backward_of(stage: Callable[..., jax.Array]) -> Callable[..., Any]:
    def backward(weights: Arrays, x: jax.Array, back: jax.Array) -> Any:
        if jnp.issubdtype(x.dtype, jnp.integer):  # tokens have no gradient
            return jax.vjp(lambda w: stage(w, x), weights)[1](back)[0], None
        return jax.vjp(stage, weights, x)[1](back)

    return backward


def _update(params: Arrays, adam: Any, gradients: Arrays) -> tuple[Arrays, Any]:
    updates, after = OPTIMIZER.update(gradients, adam, params)
    return jax.tree.map(lambda p, u: p - RATE * u, params, updates), after


def _held(params: Arrays, mesh: Mesh) -> Arrays:
    """Return the weights on the devices of a stage."""
    devices = set(mesh.devices.flat)
    return {n: a for n, a in params.items() if a.sharding.device_set == devices}


# --- the loop ---------------------------------------------------------------------------


def every(steps: int) -> int:
    """Return the interval of saves that gives several saves before the kill."""
    return max(1, steps // 6)


@cache  # its programs are compiled once for a layout
def trainer_of(strategy: js.Strategy) -> Trainer:
    return Trainer(strategy)


def train(
    layout: str, steps: int, directory: Path | None = None, *, kill_at: int = 0
) -> dict[int, float]:
    """Train from the newest step in ``directory``; return the loss of each step."""
    strategy = js.Strategy.parse(layout)
    trainer, state, first = trainer_of(strategy), new_state(strategy), 1
    manager = directory and CheckpointManager(
        directory, prefix="llama", save_every_steps=every(steps), keep_max=3, async_save=True
    )
    if manager:
        found = manager.restore(state, missing_ok=True, verify=True)
        if found:
            state, first = found.state, found.step + 1
            print(f"{layout}: goes on after step {found.step}", *found.passed_over)
    losses = {}
    for step in range(first, steps + 1):
        state, losses[step] = trainer.step(state)
        if manager:
            manager.maybe_save(step, state, extras={"batches": step})
        if step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
    if manager:
        manager.close()
    return losses


def killed_run(directory: Path, steps: int, kill_at: int) -> None:
    """Train in a separate process that is killed before it finishes."""
    command = [sys.executable, __file__, "--steps", str(steps), "--out", str(directory)]
    done = subprocess.run([*command, "--kill-at", str(kill_at)], check=False)
    assert done.returncode == -signal.SIGKILL, done.returncode


def compare(steps: int, out: Path) -> dict[str, float]:
    """Train with and without interruption; return the largest difference of the loss by layout."""
    whole = train("dp2mp4", steps)
    kill_at = steps // 2 + 2
    killed_run(out / "killed", steps, kill_at)
    curves, differences = {"dp2mp4, uninterrupted": whole}, {}
    for layout in ("dp2mp4", "dp4mp2", "pp2mp2dp2"):
        directory = out / layout
        shutil.copytree(out / "killed", directory)
        losses = train(layout, steps, directory)
        assert min(losses) <= kill_at, "more was done again than lies between two saves"
        assert min(losses) > kill_at - 2 * every(steps), "a save was lost"
        differences[layout] = max(abs(losses[n] - whole[n]) for n in losses)
        curves[f"{layout}, resumed after step {min(losses) - 1}"] = losses
        print(f"{layout}: the loss differs by {differences[layout]:.1e} at most")
    assert whole[steps] < 0.7 * whole[1], "nothing was learnt"
    assert differences["dp2mp4"] == 0.0, "the same layout must give the same bits"
    assert max(differences.values()) < 1e-3, "another layout may only differ in rounding"
    (out / "losses.json").write_text(json.dumps(curves, indent=1))
    draw(curves, out)
    return differences


def draw(curves: Mapping[str, Mapping[int, float]], out: Path) -> None:
    """Print and draw the curves."""
    whole, *others = curves.values()
    top = max(whole.values())
    print("\nloss of the uninterrupted run, and of those that were resumed:")
    for step, loss in whole.items():
        same = "  ".join(f"{o[step]:.4f}" if step in o else "      " for o in others)
        print(f"{step:4} {loss:.4f}  {same}  {'█' * round(40 * loss / top)}")
    (out / "loss.svg").write_text(picture(curves))
    print(f"drawn in {out / 'loss.svg'}")


def picture(curves: Mapping[str, Mapping[int, float]]) -> str:
    """Render the curves as SVG: the first as a line, the others as marks."""
    width, height, left, top = 640, 320, 50, 20
    whole = next(iter(curves.values()))
    steps, most = max(whole), max(max(c.values()) for c in curves.values())

    def at(step: int, loss: float) -> tuple[float, float]:
        return left + (width - left - 20) * step / steps, top + (height - 60) * (1 - loss / most)

    marks = []
    for number, (name, losses) in enumerate(curves.items()):
        colour = ("#444444", "#1f77b4", "#d62728", "#2ca02c")[number % 4]
        points = [at(step, loss) for step, loss in losses.items()]
        if number == 0:
            line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            marks.append(f'<polyline points="{line}" fill="none" stroke="{colour}"/>')
        else:  # each layout a ring of its own size, so that equal ones do not hide each other
            marks += [
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{2 * number}" fill="none" '
                f'stroke="{colour}"/>'
                for x, y in points
            ]
        y = top + 16 * (number + 1)
        marks.append(f'<text x="{width - 280}" y="{y}" fill="{colour}">{name}</text>')
    (x0, y0), (x1, _), (_, y1) = at(0, 0), at(steps, 0), at(0, most)
    axes = [
        f'<path d="M{x0:.1f} {y1:.1f}V{y0:.1f}H{x1:.1f}" fill="none" stroke="black"/>',
        f'<text x="{x0 - 40:.1f}" y="{y1 + 4:.1f}">{most:.2f}</text>',
        f'<text x="{x0 - 14:.1f}" y="{y0 + 4:.1f}">0</text>',
        f'<text x="{x1 - 50:.1f}" y="{y0 + 18:.1f}">step {steps}</text>',
        f'<text x="{x0 - 40:.1f}" y="{(y0 + y1) / 2:.1f}">loss</text>',
    ]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
    style = (
        'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
    )
    return "\n".join([head + style, *axes, *marks, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--out", type=Path, help="a folder for the runs and the picture")
    parser.add_argument("--kill-at", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.kill_at:
        train("dp2mp4", options.steps, options.out, kill_at=options.kill_at)
        return
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        compare(options.steps, options.out)
        return
    with tempfile.TemporaryDirectory() as scratch:
        compare(options.steps, Path(scratch))


if __name__ == "__main__":
    main()
