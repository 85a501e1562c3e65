"""Text tables and drawings of layouts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape

from ..core.catalog import Catalog, Tensor
from ..core.layout import Layout, Placement
from ..core.patterns import template
from ..errors import format_list, printable, quote_name, size_text
from ..formats.rank_names import rank_of_folder
from ..formats.registry import format_of
from .outputs import Outputs

_MAX_CELLS = 8
_MAX_RANKS = 16
_WIDTH, _ROW, _MARGIN = 640, 28, 16  # pixels of a drawn tensor, and around it
_ITERATION_RANK = re.compile(r"-(\d{7})-\d{7}\.safetensors$")


def count(number: int, what: str) -> str:
    """Format a number of ``what``, with plural.

    >>> count(1, "file"), count(2048, "file")
    ('1 file', '2,048 files')
    """
    return f"{number:,} {what}" + ("s" if number != 1 else "")


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Format columns under ``head``: numbers right-aligned, words left-aligned.

    >>> print(table(["rank", "file"], [[0, "a"], [10, "b"]]))
    rank  file
       0  a
      10  b
    """
    cells = [[_cell(c) for c in row] for row in rows]
    numeric = [all(c[i][:1].isdigit() for c in cells if c[i]) for i in range(len(head))]
    widths = [max(len(c[i]) for c in [list(head), *cells]) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            c.rjust(w) if right else c.ljust(w)
            for c, w, right in zip(row, widths, numeric, strict=True)
        ).rstrip()
        for row in [list(head), *cells]
    )


def _cell(value: object) -> str:
    """Format ``value`` on one line; names may come from an untrusted file."""
    text = str(value)
    return quote_name(text) if text else text


def elided(rows: Sequence[Sequence[object]], max_rows: int = _MAX_RANKS) -> list[Sequence[object]]:
    """Replace the middle of ``rows`` by an ellipsis if there are more than ``max_rows``."""
    if len(rows) <= max_rows:
        return list(rows)
    gap = ["…", *("" for _ in rows[0][1:])]
    return [*rows[: max_rows // 2], gap, *rows[len(rows) - max_rows // 2 :]]


def holders(tensor: Tensor, placement: Placement) -> str:
    """Draw the tensor as a rectangle split into shards with their ranks.

    >>> from ..core.dtypes import dtype
    >>> spec = Placement((("dp", 2), ("mp", 2)), (("mp",),))
    >>> print(holders(Tensor("w", dtype("F32"), (4, 8), ()), spec))
    w  F32 (4, 8)
    ┌──────┐
    │ 0, 2 │
    ├──────┤
    │ 1, 3 │
    └──────┘
    """
    title = f"{quote_name(tensor.name)}  {tensor.dtype} {tensor.shape}"
    return held_by(title, placement, tensor.shape)


def held_by(title: str, placement: Placement, shape: tuple[int, ...]) -> str:
    """Draw ``shape`` below ``title`` as a rectangle split by ``placement``.

    >>> print(held_by("any", Placement((("mp", 2),), ((), ("mp",))), (1, 2)))
    any
    ┌───┬───┐
    │ 0 │ 1 │
    └───┴───┘
    """
    cells = _cells(placement, shape)
    split = _split_dims(placement, shape)
    if len(split) > 2:
        title += f"  (dims {split[1:-1]} are split too)"
    return title + "\n" + _grid({at: _ranks(ranks) for at, ranks in cells.items()})


def _split_dims(placement: Placement, shape: tuple[int, ...]) -> list[int]:
    return [d for d in range(len(shape)) if placement.ways(d) > 1]


def _cells(placement: Placement, shape: tuple[int, ...]) -> dict[tuple[int, int], list[int]]:
    """Return the ranks of each shard by its row and column, the starts in two split dims.

    Of the shards that differ in other dims only, the first is in the cell.
    """
    split = _split_dims(placement, shape)
    row_dim = next((d for d in split if d < len(shape) - 1), None)
    column_dim = next((d for d in reversed(split) if d != row_dim), None)
    cells: dict[tuple[int, int], list[int]] = {}
    for shard in placement.shards(shape):
        at = (_start(shard.box.start, row_dim), _start(shard.box.start, column_dim))
        if at not in cells:
            cells[at] = [placement.first_rank + r for r in shard.holders]
    return cells


def _start(start: tuple[int, ...], dim: int | None) -> int:
    return 0 if dim is None else start[dim]


def _ranks(ranks: Sequence[int]) -> str:
    """Format a set of ranks briefly.

    >>> _ranks([0, 4]), _ranks(range(8)), _ranks([0, 4, 8, 12, 16])
    ('0, 4', '0 to 7', '0, 4, 8 … 16')
    """
    if len(ranks) > 2 and ranks[-1] - ranks[0] == len(ranks) - 1:
        return f"{ranks[0]} to {ranks[-1]}"
    if len(ranks) > 4:
        return ", ".join(map(str, ranks[:3])) + f" … {ranks[-1]}"
    return ", ".join(map(str, ranks))


def _grid(cells: dict[tuple[int, int], str]) -> str:
    rows, columns = (sorted({at[i] for at in cells}) for i in (0, 1))
    shown_rows, shown_columns = _few(rows), _few(columns)
    width = max(len(cells.get((r, c), "")) for r in rows for c in columns) + 2

    def line(left: str, middle: str, right: str) -> str:
        return left + middle.join("─" * width for _ in shown_columns) + right

    lines = [line("┌", "┬", "┐")]
    for i, r in enumerate(shown_rows):
        if i:
            lines.append(line("├", "┼", "┤"))
        texts = ["…" if r is None or c is None else cells.get((r, c), "") for c in shown_columns]
        lines.append("│" + "│".join(t.center(width) for t in texts) + "│")
    lines.append(line("└", "┴", "┘"))
    return "\n".join(lines)


def _few(values: list[int]) -> list[int | None]:
    if len(values) <= _MAX_CELLS:
        return list(values)
    return [*values[: _MAX_CELLS - 2], None, values[-1]]


def layout_pictures(tensors: Iterable[Tensor], layout: Layout, max_pictures: int = 3) -> list[str]:
    """Draw one tensor of each of the most common placements."""
    first: dict[object, tuple[int, Tensor, Placement]] = {}
    for tensor in tensors:
        for placement in layout.placements.get(tensor.name, ())[:1]:
            key = (placement.axes, placement.spec)
            seen = first.get(key)
            first[key] = (
                (seen[0] + tensor.num_bytes, *seen[1:])
                if seen
                else (tensor.num_bytes, tensor, placement)
            )
    ranked = sorted(first.values(), key=lambda f: -f[0])
    return [holders(tensor, placement) for _, tensor, placement in ranked[:max_pictures]]


def layout_svg(
    title: str, tensors: Iterable[Tensor], layout: Layout, max_pictures: int = 200
) -> str:
    """Draw each placement as a rectangle split into shards with their ranks, as SVG.

    Tensors with the same placement share a rectangle; the first rank of a shard is its color.
    The same layout is the same text.
    """
    alike: dict[tuple[Placement, int], list[Tensor]] = {}
    for tensor in tensors:
        for placement in layout.placements.get(tensor.name, ()):
            alike.setdefault((placement, len(tensor.shape)), []).append(tensor)
    groups = sorted(
        ((placement, held) for (placement, _), held in alike.items()),
        key=lambda g: (g[0].first_rank, -sum(t.num_bytes for t in g[1]), g[1][0].name),
    )
    parts, y = [_svg_text(title, _MARGIN, 24, _font(title, _WIDTH))], 48
    for placement, held in groups[:max_pictures]:
        for line in _captions(placement, held):
            parts.append(_svg_text(line, _MARGIN, y, _font(line, _WIDTH)))
            y += 16
        cells, height = _svg_cells(placement, held[0].shape, y - 8)
        parts += cells
        y += height + 20
    if len(groups) > max_pictures:
        more = f"… and {count(len(groups) - max_pictures, 'placement')} more"
        parts.append(_svg_text(more, _MARGIN, y, 12))
        y += 20
    size_of = f'width="{_WIDTH + 2 * _MARGIN}" height="{y}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size_of} font-family="monospace">'
    background = '<rect width="100%" height="100%" fill="white"/>'
    return "\n".join([head, background, *parts, "</svg>", ""])


def _captions(placement: Placement, held: Sequence[Tensor]) -> tuple[str, str]:
    """Return the kinds of tensors that share a rectangle, and how they are placed."""
    kinds = list(dict.fromkeys(template(t.name) for t in held))
    named = ", ".join(map(quote_name, kinds[:2]))
    named += f" and {len(kinds) - 2} more" if len(kinds) > 2 else ""
    total = size_text(sum(t.num_bytes for t in held))
    return named, f"{count(len(held), 'tensor')} of {total}, {placement}"


def _svg_cells(placement: Placement, shape: tuple[int, ...], top: int) -> tuple[list[str], int]:
    """Draw the shards below ``top``; also return the height."""
    cells = _cells(placement, shape)
    rows, columns = (_few(sorted({at[i] for at in cells})) for i in (0, 1))
    width = _WIDTH // len(columns)
    drawn = []
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            is_gap = row is None or column is None
            ranks = [] if row is None or column is None else cells.get((row, column), [])
            text = "…" if is_gap else _ranks(ranks)
            # the golden angle: neighbors differ, and colors repeat after 360 ranks only
            fill = f"hsl({ranks[0] * 137 % 360},70%,82%)" if ranks else "white"
            x, y = _MARGIN + j * width, top + i * _ROW
            drawn.append(
                f'<rect x="{x}" y="{y}" width="{width}" height="{_ROW}" fill="{fill}" '
                'stroke="black"/>'
            )
            font = _font(text, width)
            drawn.append(
                _svg_text(text, x + width // 2, y + _ROW // 2 + 4, font, ' text-anchor="middle"')
            )
    return drawn, _ROW * len(rows)


def _font(text: str, width: int) -> int:
    """Return the size in which ``text`` fits ``width``: a monospaced glyph is 0.6 em wide."""
    return max(4, min(12, width * 5 // (3 * max(len(text), 1))))


def _svg_text(text: str, x: int, y: int, font: int, more: str = "") -> str:
    """Return a line of text; names come from an untrusted file."""
    return f'<text x="{x}" y="{y}" font-size="{font}"{more}>{escape(printable(text))}</text>'


def catalog_text(catalog: Catalog) -> str:
    """Return the output of ``jaxshard inspect``."""
    tensors = list(catalog.tensors.values())
    kinds: dict[str, tuple[int, int]] = {}
    for t in tensors:
        n, total = kinds.get(t.dtype.name, (0, 0))
        kinds[t.dtype.name] = (n + 1, total + t.num_bytes)
    stored = sum(f.num_bytes for f in catalog.files)
    lines = [
        f"{catalog.root}: {format_title(catalog)}",
        f"{count(len(tensors), 'tensor')} of {size_text(catalog.num_bytes)} in "
        + count(len(catalog.files), "file")
        + f" of {size_text(stored)}",
        "",
        table(
            ["dtype", "tensors", "bytes"],
            [
                [k, f"{n:,}", size_text(b)]
                for k, (n, b) in sorted(kinds.items(), key=lambda i: -i[1][1])
            ],
        ),
    ]
    if catalog.layout:
        lines += ["", _rank_table(catalog)]
        for drawn in layout_pictures(tensors, catalog.layout):
            lines += ["", drawn]
    if catalog.left_out:
        found = (f"{name} ({what})" for name, what in catalog.left_out.items())
        lines += ["", f"beside tensors: {format_list(found, 20)}"]
    return "\n".join([*lines, *note_lines(catalog.notes)])


def tensor_table(tensors: Iterable[Tensor]) -> str:
    """Return a row for each tensor: its name, dtype, shape and bytes."""
    rows = [
        [t.name, t.dtype, "×".join(map(str, t.shape)) or "()", size_text(t.num_bytes)]
        for t in tensors
    ]
    return table(["tensor", "dtype", "shape", "bytes"], rows)


def note_lines(notes: Sequence[str]) -> list[str]:
    """Return ``notes`` as lines of text, after an empty one."""
    return ["", *(f"note: {printable(note)}" for note in notes)] if notes else []


def format_title(catalog: Catalog) -> str:
    """Return what kind of checkpoint ``catalog`` is, in words."""
    text = format_of(catalog.format).title or catalog.format
    if catalog.model.type:
        text += f" of a {catalog.model.type} model"
        text += f" with {catalog.model.num_layers} layers" if catalog.model.num_layers else ""
    if catalog.layout:
        axes = " × ".join(f"{a}{n}" for a, n in catalog.layout.stage_axes if n > 1)
        text += f", {catalog.layout.num_ranks} ranks" + (f" ({axes} a stage)" if axes else "")
    return text


def _rank_table(catalog: Catalog) -> str:
    """Return a row for each file, with its rank."""
    held = Counter(f for t in catalog.tensors.values() for f in {p.file for p in t.shards})
    rows = [
        [_rank_of(file.path), f"{held[number]:,}", size_text(file.num_bytes), file.path]
        for number, file in enumerate(catalog.files)
    ]
    return table(["rank", "tensors", "bytes", "path"], elided(rows))


def _rank_of(path: str) -> str:
    """Return the rank in a file's path, or an empty string.

    >>> _rank_of("rank_3/net_rank_3-1_10.ckpt"), _rank_of("llama-opt-0000003-0000008.safetensors")
    ('3', '3')
    """
    if (rank := rank_of_folder(path)) is not None:
        return str(rank)
    match = _ITERATION_RANK.search(path)
    return str(int(match[1])) if match else ""


def output_table(outputs: Outputs, only: frozenset[int] | None) -> str:
    """Return a row for each of the files numbered ``only``: its path, tensors and bytes."""
    sizes = outputs.rank_bytes()
    chosen = range(len(outputs.paths)) if only is None else sorted(only)
    of_ranks = bool(_rank_of(outputs.paths[0]))
    rows = [
        [
            _rank_of(outputs.paths[r]) if of_ranks else r,
            f"{len(outputs.contents[outputs.content_of[r]]):,}",
            size_text(sizes[r]),
            outputs.paths[r],
        ]
        for r in chosen
    ]
    head = ["rank" if of_ranks else "file", "tensors", "bytes", "path"]
    return table(head, elided(rows))
