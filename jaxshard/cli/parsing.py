"""The grammar of the command line and its help texts.

Nothing of what the commands do is imported here, so that ``--help`` is quick.
"""

from __future__ import annotations

import argparse

from ..formats.registry import FORMATS

_DESTINATION = "the folder to make; or one file: out.safetensors, out.ckpt"
_EXAMPLES = """\
examples:
  jaxshard inspect llama/                          what is in it
  jaxshard plan llama/ --to dp2mp4                 what cutting it would cost
  jaxshard slice llama/ cut/ --to dp2mp4           one file a rank
  jaxshard convert cut/ other/ --to dp1mp2pp2      any ranks to any others
  jaxshard merge cut/ whole/                       one complete checkpoint again
  jaxshard verify whole/ --against llama/          bit for bit
  jaxshard demo                                    all of it, on a small model
"""

_CONVERSIONS = {
    "plan": "show what convert would read, copy and write",
    "convert": "make a checkpoint of another layout",
    "merge": "make one complete checkpoint (convert --to full)",
    "slice": "cut a checkpoint into one file a rank",
}
_VERIFY = "check a checkpoint or a run's steps, or compare two of any layouts"


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    top = argparse.ArgumentParser(
        prog="jaxshard",
        description="Move model weights between any two layouts.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=_version())
    commands = top.add_subparsers(metavar="COMMAND")

    def command(name: str, summary: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=summary, description=summary.capitalize() + ".")
        made.set_defaults(command=name, module="commands")
        return made

    _add_inspect(command("inspect", "show what a checkpoint holds and who holds what"))
    for name, summary in _CONVERSIONS.items():
        _add_conversion(command(name, summary), name)
    _add_verify(command("verify", _VERIFY))
    _add_lora(command("lora", "merge LoRA adapters into their weights, in any layout"))
    _add_strategy(command("strategy", "show, merge and make MindSpore's strategy files"))
    _add_decrypt(command("decrypt", "make a plain .ckpt of one that MindSpore encrypted"))
    _add_demo(command("demo", "do the main job on a small checkpoint and check it bit for bit"))
    return top


def _add_inspect(to: argparse.ArgumentParser) -> None:
    _add_source(to)
    to.add_argument("--tensors", action="store_true", help="list every tensor")
    _add_output(to)


def _add_conversion(to: argparse.ArgumentParser, name: str) -> None:
    _add_source(to)
    if name != "plan":
        to.add_argument("destination", metavar="DST", help=_DESTINATION)
    _add_how(to, name)
    _add_output(to)
    _add_budget(to)
    if name != "plan":
        _add_running(to)


def _add_verify(to: argparse.ArgumentParser) -> None:
    _add_source(to)
    to.add_argument(
        "--deep", action="store_true", help="compare the checksums of every byte of a run's steps"
    )
    to.add_argument("--against", metavar="PATH", help="compare with this, bit for bit")
    to.add_argument(
        "--against-strategy",
        metavar="PATH",
        help="strategy files of the other, where it needs them",
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


def _add_decrypt(to: argparse.ArgumentParser) -> None:
    to.add_argument("source", metavar="SRC", help="the encrypted file")
    to.add_argument("destination", metavar="DST", help="the file to make")
    to.add_argument(
        "--key-file", metavar="FILE", required=True, help="a file of the key's bytes, enc_key"
    )
    to.add_argument("--overwrite", action="store_true", help="replace DST")
    _add_output(to)


def _add_demo(to: argparse.ArgumentParser) -> None:
    to.add_argument(
        "path", nargs="?", metavar="PATH", help="a checkpoint; default: made on the spot"
    )
    to.add_argument("--keep", metavar="DIR", help="leave the results there")
    _add_output(to)


def _add_strategy(to: argparse.ArgumentParser) -> None:
    verbs = to.add_subparsers(metavar="VERB", required=True)

    def verb(name: str, summary: str) -> argparse.ArgumentParser:
        made = verbs.add_parser(name, help=summary, description=summary.capitalize() + ".")
        made.set_defaults(command=f"strategy_{name}", module="strategy_commands")
        return made

    show = verb("show", "show how strategy files cut tensors, and which ranks hold what")
    show.add_argument("path", metavar="PATH", help="a strategy file, or a folder of them")
    show.add_argument("--include", metavar="REGEX", help="only these tensors")
    show.add_argument("--all", action="store_true", help="every tensor, not one line for each kind")
    _add_output(show)

    merge = verb("merge", "make one file of the strategy files of all pipeline stages")
    merge.add_argument("path", metavar="DIR", help="the folder of strategy files")
    merge.add_argument("out", metavar="OUT", help="the file to make: .ckpt, or .json")
    _add_written(merge)

    make = verb("make", "make the strategy files of a model's tensors, without a job")
    _add_source(make, "a checkpoint, a config.json, or MindFormers' configuration (.yaml)")
    make.add_argument("out", metavar="OUT", help="the folder to make; with --merged, the file")
    make.add_argument(
        "--to", metavar="STRATEGY", help="dp2mp2pp2, dp4mp2optall … (default: as a .yaml says)"
    )
    make.add_argument("--names", metavar="A:B", help="other names: llama-hf:llama-mindformers")
    make.add_argument(
        "--states", action="store_true", help="AdamW's states of each weight too (adam_m, adam_v)"
    )
    make.add_argument("--rules", metavar="FILE", help="layout rules (TOML)")
    make.add_argument("--merged", action="store_true", help="one file of all stages")
    _add_written(make)


def _add_adapter(to: argparse.ArgumentParser) -> None:
    to.add_argument(
        "--adapter", metavar="PATH", help="the adapters, where they are not in SRC: a PEFT folder …"
    )
    to.add_argument("--adapter-strategy", metavar="PATH", help="strategy files of cut adapters")
    to.add_argument(
        "--adapter-names",
        metavar="FROM=TO",
        help="what SRC calls the adapter's tensors, where it is not found: "
        "model.language_model.{x*}=language_model.model.{x*}, or a TOML file of a mapping",
    )
    to.add_argument(
        "--alpha", type=float, help="lora_alpha of the training (default: as its config says)"
    )
    to.add_argument("--scaling", type=float, help="alpha / rank itself, for all adapters alike")
    to.add_argument(
        "--adapter-rank", type=int, metavar="R", help="refuse adapters of another rank than this"
    )
    to.add_argument(
        "--fan-in-fan-out",
        action="store_true",
        default=None,
        help="square weights are stored as (in, out); others tell by their shape",
    )
    to.add_argument(
        "--reproducible",
        action="store_true",
        help="the same bits on every machine and in every layout, but slower",
    )
    to.add_argument("--unmerge", action="store_true", help="subtract, to get the base back")


def _add_written(to: argparse.ArgumentParser) -> None:
    to.add_argument("--overwrite", action="store_true", help="replace OUT")
    _add_output(to)


def _version() -> str:
    from .. import __version__  # noqa: PLC0415 - no cycle at import

    return f"jaxshard {__version__}"


def _add_source(
    to: argparse.ArgumentParser, what: str = "a checkpoint: a folder, or one weight file"
) -> None:
    to.add_argument("source", metavar="SRC", help=what)
    to.add_argument(
        "--src-strategy",
        metavar="PATH",
        help="strategy files of a source cut into ranks (default: strategy/ in or beside it)",
    )
    to.add_argument(
        "--suffix", help="which file of each rank, where there are several: 1_10, llama-1_10, .ckpt"
    )


def _add_how(to: argparse.ArgumentParser, command: str) -> None:
    if command != "merge":
        to.add_argument(
            "--to",
            metavar="TARGET",
            required=command != "convert",
            default="full" if command == "convert" else None,
            help="full, a strategy (dp2mp4pp2), a strategy file or folder, or same",
        )
    to.add_argument("--format", choices=tuple(FORMATS), help="default: as --to implies")
    to.add_argument(
        "--names",
        metavar="A:B",
        help="other names and shapes: llama-hf:llama-mindformers, or a TOML file of a mapping",
    )
    to.add_argument(
        "--rules", metavar="FILE", help="layout rules (TOML) that go before the family's"
    )
    for flag, what in (
        ("--unmatched", "names without a rule"),
        ("--uneven", "dims that do not divide"),
    ):
        choices = ("error", "replicate")
        to.add_argument(
            flag, choices=choices, default="error", help=f"{what}: refuse, or leave whole"
        )
    to.add_argument(
        "--include", metavar="REGEX", action="append", default=[], help="only these tensors"
    )
    to.add_argument(
        "--exclude", metavar="REGEX", action="append", default=[], help="not these tensors"
    )
    to.add_argument(
        "--drop-prefix",
        metavar="TEXT",
        action="append",
        default=[],
        help="not the tensors that begin so: adam_",
    )
    to.add_argument(
        "--keep-accu-grads", action="store_true", help="accumulated gradients too (default: not)"
    )
    to.add_argument(
        "--rank", metavar="R", action="append", type=int, help="write only this rank's file"
    )
    to.add_argument(
        "--max-shard-size", metavar="SIZE", help="of a complete checkpoint (default: 5GB)"
    )
    to.add_argument("--prefix", default="checkpoint", help="of rank files (default: checkpoint)")
    to.add_argument(
        "--step",
        metavar="E_S",
        help="epoch and step in the names of rank files, PREFIX_rank_R-E_S (default: the source's, "
        "or 1_1); none: PREFIX alone, as MindSpore slices",
    )
    to.add_argument(
        "--remove-redundancy", action="store_true", help="store each shard on one replica only"
    )
    to.add_argument("--crc", action="store_true", help="end every .ckpt with a checksum")
    to.add_argument(
        "--checksums", action="store_true", help="write checksums.json beside the files, for verify"
    )


def _add_budget(to: argparse.ArgumentParser) -> None:
    to.add_argument(
        "--workers", type=int, metavar="N", help="threads (default: one a core, at most 8)"
    )
    to.add_argument("--host-bytes", metavar="SIZE", help="most memory for data (default: 256MiB)")


def _add_running(to: argparse.ArgumentParser) -> None:
    to.add_argument("--dry-run", action="store_true", help="show the plan and do nothing")
    to.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    to.add_argument(
        "--process-index",
        metavar="I",
        help="do part I of the files; others, here or on other hosts, do the rest, in any order",
    )
    to.add_argument(
        "--process-count",
        metavar="N",
        help="in how many parts; auto takes both numbers from SLURM or Open MPI",
    )
    to.add_argument(
        "--overwrite", action="store_true", help="replace DST, a checkpoint, once the new is whole"
    )
    to.add_argument(
        "--check-replicas",
        action="store_true",
        help="first read all that SRC stores several times, and refuse it where that differs",
    )
    to.add_argument(
        "--no-fsync",
        action="store_true",
        help="leave it to the system when data reaches the disk (a power cut may lose the result)",
    )


def _add_output(to: argparse.ArgumentParser) -> None:
    to.add_argument("--json", action="store_true", help="answer in JSON")
    to.add_argument("--quiet", action="store_true", help="no progress and no report")
