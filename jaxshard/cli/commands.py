"""Commands of the command line; ``parsing`` defines their arguments."""

from __future__ import annotations

import os
import sys
import time
from argparse import Action, ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..conversion.execute import Progress, Report, execute, progress_of
from ..conversion.open import open_checkpoint
from ..conversion.prepare import Prepared, RunOptions, part_plan, prepare, with_requests
from ..conversion.select import select
from ..core.catalog import Catalog, Tensor
from ..core.decoders import MAX_TOML_BYTES
from ..distributed.processes import part_of
from ..errors import LayoutError, NotFoundError, format_list, size_text
from ..models import Sizes, family_of, model_types, register_models
from ..planning import pictures
from ..rules import Rules, read_rules
from ..storage.fs import read_bytes, read_text, write_user_file
from ..storage.resources import budget_for
from . import write, write_json, write_paged
from .parsing import parser

if TYPE_CHECKING:
    from ..conversion.verify import Verdict

_SORT_KEYS: dict[str, Callable[[Tensor], Any]] = {
    "name": lambda t: t.name,
    "bytes": lambda t: (-t.num_bytes, t.name),
    "dtype": lambda t: (t.dtype.name, t.name),
}
_MAX_KEY_BYTES = 4096
_PATHS = ("SRC", "DST", "OUT", "PATH", "FILE", "DIR")  # metavars of paths
_PROBLEM = 3  # exit status for an invalid checkpoint


def inspect(a: Namespace) -> int:
    """Show the contents of a checkpoint, or the steps of a training run."""
    if not a.svg and (done := _run_of_steps(a, deep=False)) is not None:
        return done
    catalog = _source(a)
    listed = _listed(catalog, a.include, a.sort)
    if a.svg:
        if catalog.layout is None:
            raise LayoutError(
                f"--svg: {catalog.root} is not partitioned over ranks. "
                "Draw a target's layout with: jaxshard plan SRC --to STRATEGY --svg FILE."
            )
        _write_svg(a, pictures.layout_svg(catalog.root, listed, catalog.layout))
    if a.json:
        write_json(_catalog_facts(catalog, listed))
    elif not a.quiet:
        text = pictures.catalog_text(catalog)
        if a.tensors or a.include or a.sort:
            text += "\n\n" + pictures.tensor_table(listed)
        (write if a.no_pager else write_paged)(text)
    return 0


def _listed(catalog: Catalog, include: Sequence[str], sort: str | None) -> list[Tensor]:
    """Return the tensors that match ``include``, in the order ``sort``."""
    if include:
        found, _ = select(catalog, include, may_lack=True)
    else:
        found = list(catalog.tensors.values())
    return sorted(found, key=_SORT_KEYS[sort]) if sort else found


def plan(a: Namespace) -> int:
    """Show the plan of ``convert`` without running it."""
    prepared = _prepare(a, a.to)
    if a.svg:
        made = prepared.plan
        tensors, layout = made.source.tensors.values(), made.outputs.layout
        _write_svg(a, pictures.layout_svg(f"{a.source} as {a.to}", tensors, layout))
    return _show_plan(prepared, a)


def _write_svg(a: Namespace, text: str) -> None:
    if not a.svg.endswith(".svg"):  # a typo must not replace a checkpoint's file
        raise LayoutError(f"--svg {a.svg}: not the name of a picture. Let it end in .svg.")
    try:
        write_user_file(Path(a.svg), text.encode(), overwrite=a.overwrite)
    except FileExistsError:
        raise LayoutError(
            f"--svg {a.svg} exists. Choose another file, or replace it with --overwrite."
        ) from None


def convert(a: Namespace) -> int:
    """Write a checkpoint in another layout."""
    return _convert(a, a.to)


def merge(a: Namespace) -> int:
    """Write one complete checkpoint."""
    return _convert(a, "full")


def slice(a: Namespace) -> int:
    """Write a checkpoint as one file per rank."""
    return _convert(a, a.to)


def verify(a: Namespace) -> int:
    """Check a checkpoint or the steps of a training run, or compare two."""
    if not a.against and (done := _run_of_steps(a, deep=a.deep)) is not None:
        return done
    if a.deep:
        raise LayoutError(
            f"--deep is for the steps of a training run, and {a.source} "
            + ("is compared as one checkpoint" if a.against else "is not the directory of a run")
            + ". Omit it: all replicas of a checkpoint are read anyway."
        )
    from ..conversion.verify import verify as verify_alone  # noqa: PLC0415 - NumPy
    from ..conversion.verify import verify_against  # noqa: PLC0415

    budget = budget_for(a.host_bytes, a.workers)
    catalog = _source(a)
    with _bar("checking", a) as begin:
        verdict = verify_alone(catalog, budget=budget, progress=begin and begin(0))
        if a.against and not verdict.problems:
            other = open_checkpoint(a.against, src_strategy=a.against_strategy)
            verdict = verify_against(
                catalog,
                other,
                budget=budget,
                progress=begin and begin(catalog.num_bytes),
            )
    return _show_verdict(verdict, a)


def _run_of_steps(a: Namespace, *, deep: bool) -> int | None:
    """Show the steps if the source is the directory of a training run; otherwise return None."""
    if not any(os.path.isdir(os.path.join(a.source, f)) for f in (".jaxshard", "checkpoint")):
        return None
    from ..training import open_step, run_directory  # noqa: PLC0415 - only for runs
    from ..training import steps as run_steps  # noqa: PLC0415 - only for runs

    steps = run_steps.steps_of_run(a.source)
    if not steps:
        return None
    with _bar("checking", a) as begin:
        progress = begin(sum(s.num_bytes for s in steps)) if begin and deep else None
        place = run_directory.RunDirectory.of(a.source)
        steps = open_step.examine_all(place, steps, deep=deep, progress=progress)
    well = run_steps.is_well(steps)
    best = run_steps.resumes_from(steps)
    if a.json:
        write_json(
            {
                "steps": run_steps.facts(steps),
                "resumes_from": str(best.name) if best else None,
                "replicas_compared": False,
            }
        )
    elif not a.quiet:
        head = ("step", "number", "state", "format", "size", "age", "")
        write(pictures.table(head, run_steps.rows(steps, size_text, time.time())))
        write(run_steps.verdict(best, deep=deep))
        newest = os.path.join(a.source, "checkpoint")
        if a.command == "verify" and os.path.isdir(newest):
            write(f"note: replicas are not compared; jaxshard verify {newest} does that.")
    return 0 if well or a.command == "inspect" else _PROBLEM


def lora(a: Namespace) -> int:
    """Merge LoRA adapters into their base weights."""
    from ..lora import with_adapter  # noqa: PLC0415 - only this command needs it

    source = with_adapter(
        _source(a),
        a.adapter,
        alpha=a.alpha,
        adapter_rank=a.adapter_rank,
        scaling=a.scaling,
        fan_in_fan_out=a.fan_in_fan_out,
        unmerge=a.unmerge,
        reproducible=a.reproducible,
        adapter_strategy=a.adapter_strategy,
        adapter_names=a.adapter_names,
    )
    return _convert(a, a.to, source)


def models(a: Namespace) -> int:
    """List the model families, or show the table of one."""
    if a.model is None:
        families = {kind: family_of({}, kind) for kind in model_types()}
        if a.json:
            write_json({kind: family.listed for kind, family in families.items()})
        elif not a.quiet:
            rows = [(kind, ", ".join(family.listed)) for kind, family in families.items()]
            write(pictures.table(("model_type", "forms"), rows))
        return 0
    is_type = a.model in model_types()
    config = {} if is_type else open_checkpoint(a.model).model.config
    family = family_of(config, a.model if is_type else None)
    form, sizes = a.form or "hf", Sizes(family, config)
    found = [
        (weight, row.name, str(row.axes), row.steps) for weight, row in family.form(form).items()
    ]
    if a.json:
        keys = ("weight", "name", "axes", "steps")
        write_json([dict(zip(keys, row, strict=True)) for row in found])
    elif not a.quiet:
        write(f"{family.name}, {form} (forms: {', '.join(family.listed)})\n")
        write(pictures.table(("weight", "name", "axes", "steps"), found))
        known = [f"{axis} = {n}" for axis in family.sizes if (n := sizes.get(axis)) is not None]
        write("\n" + (", ".join(known) if config else _lengths(family.sizes)))
    return 0


def _lengths(sizes: Mapping[str, str]) -> str:
    return pictures.table(("axis", "length by config.json"), sorted(sizes.items()))


def decrypt(a: Namespace) -> int:
    """Decrypt a MindSpore checkpoint file."""
    from ..conversion.decrypt import decrypt as decrypt_file  # noqa: PLC0415 - only this command needs it

    key = read_bytes(a.key_file, _MAX_KEY_BYTES, f"--key-file {a.key_file}")
    key = key.removesuffix(b"\n")  # editors and echo append it
    place = decrypt_file(a.source, a.destination, key, overwrite=a.overwrite)
    if a.json:
        write_json({"destination": str(place), "num_bytes": place.stat().st_size})
    elif not a.quiet:
        write(f"{place}: {size_text(place.stat().st_size)}, decrypted")
    return 0


def demo(a: Namespace) -> int:
    """Run the demo on a small checkpoint."""
    from .demo import run_demo  # noqa: PLC0415 - JAX, which no other command imports

    return run_demo(a.path, keep=a.keep, quiet=a.quiet or a.json, as_json=a.json)


def completion(a: Namespace) -> int:
    """Print the shell's completion script."""
    try:
        import shtab  # noqa: PLC0415 - an extra
    except ImportError:
        raise NotFoundError(
            "completion: the package shtab is not installed. "
            "Install it with: pip install 'jaxshard[completion]'."
        ) from None
    top = parser()
    for action in _actions(top):
        if action.metavar in _PATHS:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(top, a.shell))  # as it is: the text is shtab's and ours
    return 0


def _actions(of: ArgumentParser) -> Iterator[Action]:
    """Yield the arguments of a parser and of the commands below it."""
    for action in of._actions:
        yield action
        if isinstance(action.choices, dict):
            for command in action.choices.values():
                yield from _actions(command)


def _convert(a: Namespace, to: str, source: Catalog | None = None) -> int:
    prepared = _prepare(a, to, source)
    if a.dry_run:
        part = part_of(a.process_index, a.process_count, os.environ)
        return _show_plan(replace(prepared, plan=part_plan(prepared.plan, part)), a)
    with _bar("writing", a) as begin:
        report = execute(prepared, a.destination, progress=begin, **_run_options(a))
    if a.json:
        write_json(asdict(report))
    elif not a.quiet:
        write(_report_text(report))
    return 0


def _prepare(a: Namespace, to: str, source: Catalog | None = None) -> Prepared:
    return prepare(
        source or _source(a),
        to,
        names=a.names,
        rules=read_rules_file(a.rules),
        unmatched=a.unmatched,
        uneven=a.uneven,
        include=a.include,
        exclude=a.exclude,
        drop_prefix=a.drop_prefix,
        keep_accu_grads=a.keep_accu_grads,
        rank=a.rank,
        max_shard_size=a.max_shard_size,
        prefix=a.prefix,
        step=a.step,
        remove_redundancy=a.remove_redundancy,
        format=a.format,
        crc=a.crc,
        checksums=a.checksums,
        workers=a.workers,
        host_bytes=a.host_bytes,
        destination=getattr(a, "destination", None),
    )


def _source(a: Namespace) -> Catalog:
    config = getattr(a, "config", None)
    return open_checkpoint(a.source, src_strategy=a.src_strategy, suffix=a.suffix, config=config)


def register_files(paths: Sequence[str]) -> None:
    """Register the model families of ``--models``."""
    for path in paths:
        register_models(read_text(path, MAX_TOML_BYTES, f"--models {path}"), path)


def read_rules_file(path: str | None) -> Rules | None:
    """Read the rules of ``--rules``, if the user passed it."""
    if path is None:
        return None
    return read_rules(read_text(path, MAX_TOML_BYTES, f"--rules {path}"), path)


def _run_options(a: Namespace) -> RunOptions:
    return {
        "resume": a.resume,
        "overwrite": a.overwrite,
        "fsync": not a.no_fsync,
        "process_index": a.process_index,
        "process_count": a.process_count,
        "check_replicas": a.check_replicas,
        "stream": a.stream,
    }


def _bar(what: str, a: Namespace) -> AbstractContextManager[Callable[[int], Progress] | None]:
    """Show a progress bar if standard error is a terminal; without one rich is not imported."""
    return progress_of(sys.stderr.isatty() and not (a.quiet or a.json), what)


def _show_plan(prepared: Prepared, a: Namespace) -> int:
    destination, stream = getattr(a, "destination", None), getattr(a, "stream", False)
    made = with_requests(prepared, destination, None, stream=stream)
    if a.json:
        write_json(
            {
                **asdict(made.totals),
                "peak_host_bytes": made.host_bytes,
                "reads_of_files": dict(
                    zip((f.path for f in made.source.files), made.reads, strict=True)
                ),
                "format": prepared.result.format,
                "rank_bytes": made.outputs.rank_bytes(),
                "paths": made.outputs.paths,
                "notes": made.notes,
            }
        )
    elif not a.quiet:
        write(str(made))
    return 0


def _show_verdict(verdict: Verdict, a: Namespace) -> int:
    if a.json:
        write_json(asdict(verdict))
    elif not a.quiet:
        for note in verdict.notes:
            write(f"note: {note}")
        for problem in verdict.problems:
            write(problem)
        compared = (
            f", {size_text(verdict.bytes_compared)} compared" if verdict.bytes_compared else ""
        )
        outcome = "all is well"
        if verdict.problems:
            outcome = pictures.count(len(verdict.problems), "problem")
        elif verdict.unchecked:
            outcome = f"no problem; not checked: {format_list(verdict.unchecked)}"
        write(f"{pictures.count(verdict.num_tensors, 'tensor')}{compared}: {outcome}")
    return _PROBLEM if verdict.problems else 0


def _report_text(report: Report) -> str:
    c = report.counts
    lines = [
        f"{report.destination}: {pictures.count(report.num_files, 'file')} with "
        f"{size_text(c.bytes_written)} written, {size_text(c.bytes_read)} read"
    ]
    if report.skipped_files:
        lines.append(f"finished before: {pictures.count(report.skipped_files, 'file')}")
    if not report.is_published:
        lines.append(f"{report.part} is done; the result appears when all others are")
    lines += [f"note: {note}" for note in report.notes]
    return "\n".join(lines)


def _catalog_facts(catalog: Catalog, listed: Sequence[Tensor]) -> dict[str, Any]:
    return {
        "root": catalog.root,
        "format": catalog.format,
        "model_type": catalog.model.type,
        "num_layers": catalog.model.num_layers,
        "num_tensors": len(catalog.tensors),
        "num_bytes": catalog.num_bytes,
        "num_ranks": catalog.layout.num_ranks if catalog.layout else None,
        "files": [{"path": f.path, "num_bytes": f.num_bytes} for f in catalog.files],
        "tensors": {
            t.name: {"dtype": t.dtype.name, "shape": t.shape, "num_pieces": len(t.shards)}
            for t in listed
        },
        "left_out": dict(catalog.left_out),
        "notes": catalog.notes,
    }
