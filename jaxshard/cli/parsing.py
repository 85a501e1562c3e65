"""The arguments of the command line and their help texts.

This module does not import the commands, so that ``--help`` is fast.
"""

from __future__ import annotations

import argparse
from typing import TypedDict

from ..formats.registry import FORMATS

_DESTINATION = "directory to write, or one file: out.safetensors, out.ckpt"
_EXAMPLES = """\
examples:
  jaxshard inspect llama/                          show the contents
  jaxshard plan llama/ --to dp2mp4                 show the cost of slicing it
  jaxshard slice llama/ cut/ --to dp2mp4           write one file per rank
  jaxshard convert cut/ other/ --to dp1mp2pp2      change the strategy
  jaxshard merge cut/ whole/                       write one complete checkpoint
  jaxshard verify whole/ --against llama/          compare bit for bit
  jaxshard demo                                    run all of these on a small model
"""

_EXAMPLES_OF = {
    "inspect": ("inspect llama/ --include q_proj --sort bytes", "inspect cut/ --json"),
    "plan": ("plan llama/ --to dp2mp4", "plan cut/ --to full --json"),
    "convert": (
        "convert cut/ other/ --to dp1mp2pp2",
        "convert llama/ ms/ --to mp2 --names llama-hf:llama-mindformers",
    ),
    "merge": ("merge cut/ whole/", "merge cut/ whole.safetensors"),
    "slice": ("slice llama/ cut/ --to dp2mp4", "slice llama/ ckpt/ --to mp2 --format ckpt"),
    "verify": ("verify llama/", "verify whole/ --against llama/"),
    "lora": (
        "lora llama/ merged/ --adapter adapter/",
        "lora merged/ base/ --adapter adapter/ --unmerge",
    ),
    "strategy": ("strategy show cut/strategy/", "strategy merge cut/strategy/ all.ckpt"),
    "strategy show": (
        "strategy show cut/strategy/",
        "strategy show cut/strategy/ --include q_proj --all",
    ),
    "strategy merge": (
        "strategy merge cut/strategy/ merged.ckpt",
        "strategy merge cut/strategy/ merged.json",
    ),
    "strategy make": (
        "strategy make llama/ strategy/ --to dp2mp2pp2",
        "strategy make llama/ stages.ckpt --to dp2mp2pp2 --merged",
    ),
    "models": ("models", "models llama --form maxtext"),
    "decrypt": (
        "decrypt secret.ckpt plain.ckpt --key-file key",
        "decrypt secret.ckpt plain.ckpt --key-file key --overwrite",
    ),
    "completion": (
        "completion bash > ~/.local/share/bash-completion/completions/jaxshard",
        "completion zsh > ~/.zfunc/_jaxshard",
    ),
    "demo": ("demo", "demo llama/ --keep results/"),
}

_CONVERSIONS = {
    "plan": "show what convert would read, copy and write",
    "convert": "write a checkpoint in another layout",
    "merge": "write one complete checkpoint (convert --to full)",
    "slice": "write a checkpoint as one file per rank",
}
_VERIFY = "check a checkpoint or the steps of a run, or compare two checkpoints of any layouts"


class _HelpFormatter(argparse.HelpFormatter):
    """Wrap descriptions, but keep the lines of the examples."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith("examples:") else super()._fill_text(text, width, indent)


class _Help(TypedDict):
    """The arguments of ``add_parser`` that describe a command."""

    description: str
    epilog: str
    formatter_class: type[_HelpFormatter]


def parser() -> argparse.ArgumentParser:
    """Build the argument parser."""
    top = argparse.ArgumentParser(
        prog="jaxshard",
        description="Move model weights between any two layouts.",
        epilog=_EXAMPLES,
        formatter_class=_HelpFormatter,
    )
    top.add_argument("--version", action="version", version=_version())
    commands = top.add_subparsers(metavar="COMMAND")

    def command(name: str, summary: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=summary, **_help_of(name, summary))
        made.set_defaults(command=name, module="commands")
        return made

    _add_inspect(
        command("inspect", "show the tensors of a checkpoint and which rank holds which shard")
    )
    for name, summary in _CONVERSIONS.items():
        _add_conversion(command(name, summary), name)
    _add_verify(command("verify", _VERIFY))
    _add_lora(command("lora", "merge LoRA adapters into their base weights, in any layout"))
    _add_strategy(command("strategy", "show, merge or write MindSpore strategy files"))
    _add_models(command("models", "list the known model families, or show the table of one"))
    _add_decrypt(command("decrypt", "decrypt a .ckpt that MindSpore encrypted"))
    _add_demo(
        command(
            "demo",
            "convert, load, reshard and save a small checkpoint, and "
            "compare the results bit for bit",
        )
    )
    _add_completion(
        command("completion", "print a shell script that completes commands, flags, paths")
    )
    return top


def _add_completion(to: argparse.ArgumentParser) -> None:
    to.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="shell that runs the script")


def _add_inspect(to: argparse.ArgumentParser) -> None:
    _add_source(to)
    to.add_argument("--tensors", action="store_true", help="list every tensor")
    to.add_argument(
        "--include",
        metavar="REGEX",
        action="append",
        default=[],
        help="list only matching tensors (repeatable; implies --tensors)",
    )
    to.add_argument(
        "--sort",
        choices=("name", "bytes", "dtype"),
        help="order of the list: by name, largest first, or by dtype (implies --tensors; "
        "default: as stored)",
    )
    _add_svg(to)
    to.add_argument(
        "--no-pager",
        action="store_true",
        help="do not show a list longer than the terminal with $PAGER (default: less -FRX)",
    )
    _add_output(to)


def _add_conversion(to: argparse.ArgumentParser, name: str) -> None:
    _add_source(to)
    if name != "plan":
        to.add_argument("destination", metavar="DST", help=_DESTINATION)
    _add_how(to, name)
    if name == "plan":
        _add_svg(to)
    _add_output(to)
    _add_budget(to)
    if name != "plan":
        _add_running(to)


def _add_svg(to: argparse.ArgumentParser) -> None:
    to.add_argument("--svg", metavar="FILE", help="also draw which rank holds which shard (.svg)")
    to.add_argument("--overwrite", action="store_true", help="replace the file of --svg")


def _add_verify(to: argparse.ArgumentParser) -> None:
    _add_source(to)
    to.add_argument(
        "--deep", action="store_true", help="compare the checksums of all files of a run's steps"
    )
    to.add_argument("--against", metavar="PATH", help="checkpoint to compare with, bit for bit")
    to.add_argument(
        "--against-strategy",
        metavar="PATH",
        help="strategy files of --against",
    )
    _add_budget(to)
    _add_output(to)


def _add_lora(to: argparse.ArgumentParser) -> None:
    _add_source(to)
    to.add_argument("destination", metavar="DST", help=_DESTINATION)
    _add_adapter(to)
    _add_how(to, "convert")
    _add_budget(to)
    _add_output(to)
    _add_running(to)


def _add_models(to: argparse.ArgumentParser) -> None:
    to.add_argument(
        "model", nargs="?", metavar="MODEL", help="model_type, or the directory of a model"
    )
    to.add_argument("--form", metavar="FORM", help="show only this form (default: hf)")
    _add_tables(to)
    _add_output(to)


def _add_tables(to: argparse.ArgumentParser) -> None:
    to.add_argument(
        "--models",
        metavar="FILE",
        action="append",
        default=[],
        help="table of a model family (TOML, see docs/models.md; repeatable)",
    )


def _add_decrypt(to: argparse.ArgumentParser) -> None:
    to.add_argument("source", metavar="SRC", help="encrypted file")
    to.add_argument("destination", metavar="DST", help="file to write")
    to.add_argument(
        "--key-file", metavar="FILE", required=True, help="file that contains the key (enc_key)"
    )
    to.add_argument("--overwrite", action="store_true", help="replace DST")
    _add_output(to)


def _add_demo(to: argparse.ArgumentParser) -> None:
    to.add_argument(
        "path", nargs="?", metavar="PATH", help="checkpoint to use (default: a generated one)"
    )
    to.add_argument("--keep", metavar="DIR", help="directory in which the results are kept")
    _add_output(to)


def _add_strategy(to: argparse.ArgumentParser) -> None:
    verbs = to.add_subparsers(metavar="VERB", required=True)

    def verb(name: str, summary: str) -> argparse.ArgumentParser:
        made = verbs.add_parser(name, help=summary, **_help_of(f"strategy {name}", summary))
        made.set_defaults(command=f"strategy_{name}", module="strategy_commands")
        return made

    show = verb(
        "show", "show how strategy files partition tensors, and which rank holds which shard"
    )
    show.add_argument("path", metavar="PATH", help="strategy file, or directory of strategy files")
    show.add_argument("--include", metavar="REGEX", help="show only matching tensors")
    show.add_argument(
        "--all", action="store_true", help="one line per tensor instead of one per kind"
    )
    _add_output(show)

    merge = verb("merge", "merge the strategy files of all pipeline stages into one file")
    merge.add_argument("path", metavar="DIR", help="directory of strategy files")
    merge.add_argument("out", metavar="OUT", help="file to write: .ckpt or .json")
    _add_written(merge)

    make = verb("make", "write the strategy files of a model without running a job")
    _add_source(make, "checkpoint, config.json, or MindFormers configuration (.yaml)")
    make.add_argument("out", metavar="OUT", help="directory to write; with --merged, file to write")
    make.add_argument(
        "--to", metavar="STRATEGY", help="strategy, such as dp2mp2pp2 (default: that of the .yaml)"
    )
    make.add_argument(
        "--names", metavar="A:B", help="rename the tensors: llama-hf:llama-mindformers"
    )
    make.add_argument(
        "--states",
        action="store_true",
        help="include AdamW's states of each weight (adam_m, adam_v)",
    )
    make.add_argument("--rules", metavar="FILE", help="file with layout rules (TOML)")
    make.add_argument("--merged", action="store_true", help="write one file for all stages")
    _add_written(make)


def _add_adapter(to: argparse.ArgumentParser) -> None:
    to.add_argument(
        "--adapter",
        metavar="PATH",
        help="PEFT directory or checkpoint with the adapters (default: SRC)",
    )
    to.add_argument("--adapter-strategy", metavar="PATH", help="strategy files of the adapters")
    to.add_argument(
        "--adapter-names",
        metavar="FROM=TO",
        help="names of the adapter's tensors in SRC, if they are not found automatically: "
        "model.language_model.{x*}=language_model.model.{x*}, or a mapping (TOML)",
    )
    to.add_argument(
        "--alpha",
        type=float,
        help="lora_alpha of the training (default: from the adapter's config)",
    )
    to.add_argument("--scaling", type=float, help="alpha / rank, for all adapters")
    to.add_argument("--adapter-rank", type=int, metavar="R", help="required rank of the adapters")
    to.add_argument(
        "--fan-in-fan-out",
        action="store_true",
        default=None,
        help="square weights are stored as (in, out); other weights are detected by their shape",
    )
    to.add_argument(
        "--reproducible",
        action="store_true",
        help="compute the same bits on every machine and in every layout (slower)",
    )
    to.add_argument(
        "--unmerge", action="store_true", help="subtract the adapters, to restore the base weights"
    )


def _add_written(to: argparse.ArgumentParser) -> None:
    to.add_argument("--overwrite", action="store_true", help="replace OUT")
    _add_output(to)


def _help_of(command: str, summary: str) -> _Help:
    examples = "".join(f"\n  jaxshard {line}" for line in _EXAMPLES_OF[command])
    return {
        "description": f"{summary[0].upper()}{summary[1:]}.",
        "epilog": f"examples:{examples}",
        "formatter_class": _HelpFormatter,
    }


def _version() -> str:
    from .. import __version__  # noqa: PLC0415 - no cycle at import

    return f"jaxshard {__version__}"


def _add_source(
    to: argparse.ArgumentParser, what: str = "checkpoint: a directory, or one weight file"
) -> None:
    to.add_argument("source", metavar="SRC", help=what)
    _add_tables(to)
    to.add_argument(
        "--src-strategy",
        metavar="PATH",
        help="strategy files of SRC (default: strategy/ in SRC or in its parent)",
    )
    to.add_argument(
        "--suffix", help="which file of each rank, if there are several: 1_10, llama-1_10, .ckpt"
    )


def _add_how(to: argparse.ArgumentParser, command: str) -> None:
    if command != "merge":
        to.add_argument(
            "--to",
            metavar="TARGET",
            required=command != "convert",
            default="full" if command == "convert" else None,
            help="full, a strategy (dp2mp4pp2, fsdp4mp2), strategy files, or same (as SRC)",
        )
    to.add_argument(
        "--format", choices=tuple(FORMATS), help="format to write (default: implied by --to)"
    )
    to.add_argument(
        "--names",
        metavar="A:B",
        help="map names and shapes: llama-hf:llama-mindformers, or a mapping (TOML)",
    )
    to.add_argument(
        "--config",
        metavar="FILE",
        help="config.json of the model, for a SRC without one, or in place of its own",
    )
    to.add_argument(
        "--rules",
        metavar="FILE",
        help="file with layout rules (TOML) that precede the built-in ones",
    )
    to.add_argument(
        "--unmatched",
        choices=("error", "replicate", "largest"),
        default="error",
        help="names that match no rule: raise an error, replicate the tensor, or split its largest "
        "dims",
    )
    to.add_argument(
        "--uneven",
        choices=("error", "replicate"),
        default="error",
        help="dims that are not divisible: raise an error, or replicate the tensor",
    )
    to.add_argument(
        "--include",
        metavar="REGEX",
        action="append",
        default=[],
        help="only matching tensors (repeatable)",
    )
    to.add_argument(
        "--exclude",
        metavar="REGEX",
        action="append",
        default=[],
        help="skip matching tensors (repeatable)",
    )
    to.add_argument(
        "--drop-prefix",
        metavar="TEXT",
        action="append",
        default=[],
        help="skip tensors whose names start with TEXT: adam_ (repeatable)",
    )
    to.add_argument("--keep-accu-grads", action="store_true", help="include accumulated gradients")
    to.add_argument(
        "--rank",
        metavar="R",
        action="append",
        type=int,
        help="write only the file of rank R (repeatable)",
    )
    to.add_argument(
        "--max-shard-size",
        metavar="SIZE",
        help="maximum file size of a complete checkpoint (default: 5GB)",
    )
    to.add_argument(
        "--prefix",
        default="checkpoint",
        help="file name prefix of rank files (default: checkpoint)",
    )
    to.add_argument(
        "--step",
        metavar="E_S",
        help="epoch and step in the names of rank files, PREFIX_rank_R-E_S (default: those of SRC, "
        "or 1_1); none: the names that MindSpore's slicing writes",
    )
    to.add_argument(
        "--remove-redundancy",
        action="store_true",
        help="store each shard once, not on every replica",
    )
    to.add_argument("--crc", action="store_true", help="append a checksum to every .ckpt")
    to.add_argument(
        "--checksums", action="store_true", help="write checksums.json, which verify compares"
    )


def _add_budget(to: argparse.ArgumentParser) -> None:
    to.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="number of threads (default: one per core, at most 8)",
    )
    to.add_argument(
        "--host-bytes", metavar="SIZE", help="memory limit for data in flight (default: 256MiB)"
    )


def _add_running(to: argparse.ArgumentParser) -> None:
    to.add_argument("--dry-run", action="store_true", help="show the plan and write nothing")
    to.add_argument("--resume", action="store_true", help="continue an interrupted run")
    to.add_argument(
        "--process-index",
        metavar="I",
        help="index of this process (0-based); each process writes part of the files",
    )
    to.add_argument(
        "--process-count",
        metavar="N",
        help="number of processes; auto reads both numbers from SLURM or Open MPI",
    )
    to.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the checkpoint DST when the new one is complete",
    )
    to.add_argument(
        "--check-replicas",
        action="store_true",
        help="verify that replicas in SRC are identical before converting",
    )
    to.add_argument(
        "--stream",
        action="store_true",
        help="read hf:// paths by ranges, without a copy in the local cache",
    )
    to.add_argument(
        "--no-fsync",
        action="store_true",
        help="do not flush the files to disk (a power failure may lose the result)",
    )


def _add_output(to: argparse.ArgumentParser) -> None:
    to.add_argument("--json", action="store_true", help="print the result as JSON")
    to.add_argument(
        "-q", "--quiet", action="store_true", help="print neither progress nor a report"
    )
