"""The attribution graph that `graph.py` left, drawn: docs/images/attribution-graph.svg.

    python -m tests.interop.picture GRAPH OUT

Columns are tokens, rows are layers; the embeddings are at the bottom, the logits at the top.
"""

import json
import sys
from collections import defaultdict
from html import escape
from pathlib import Path
from typing import Any

WIDTH, ROW, LEFT, TOP = 1160, 52, 80, 40
LONGEST = 9
"""Letters of a token that are shown."""
COLOURS = {"latent": "#2a6f97", "error": "#b8b8b8", "token": "#444444", "logit": "#9a3412"}
NAMES = {"latent": "latent", "error": "what the transcoder leaves", "token": "token", "logit": "next token"}
POSITIVE, NEGATIVE = "#2a6f97", "#c2410c"
BOX, DOT, WORD = 14, 11, 44
"""Height of a word, and the least distance of two dots and of two words."""


def draw(graph: dict[str, Any]) -> str:
    """Return the picture as SVG."""
    places, height = _places(graph), TOP + ROW * (graph["layers"] + 2) + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        *_legend(graph),
        *_layers(graph["layers"]),
        *_edges(graph, places),
        *_nodes(graph, places),
        "</svg>\n",
    ]
    return "\n".join(parts)


def _row(graph: dict[str, Any], layer: int) -> float:
    return TOP + ROW * (graph["layers"] - layer + 0.5)


def _places(graph: dict[str, Any]) -> list[tuple[float, float]]:
    """Where each node's middle is; nodes of one token and layer stand side by side, and make its column wider."""
    cells = defaultdict(list)
    for number, (_, layer, position, _) in enumerate(graph["nodes"]):
        cells[layer, position].append(number)
    top, found = graph["layers"], {}
    wide = [WORD] * len(graph["tokens"])
    for (layer, position), members in cells.items():
        if layer < top:
            wide[position] = max(wide[position], len(members) * DOT)
    ends = [LEFT + sum(wide[: i + 1]) * (WIDTH - LEFT) / sum(wide) for i in range(len(wide))]
    for (layer, position), members in cells.items():
        spread = DOT if layer < top else 2 * WORD  # logits are too long to stand above their token
        middle = (ends[position] + (ends[position - 1] if position else LEFT)) / 2
        first = middle - spread * (len(members) - 1) / 2 if layer < top else WIDTH - spread * (len(members) - 0.5)
        for i, number in enumerate(members):
            found[number] = (first + i * spread, _row(graph, layer))
    return [found[number] for number in range(len(found))]


def _layers(count: int) -> list[str]:
    names = {-1: "embedding", **{i: f"layer {i}" for i in range(count)}, count: "logits"}
    return [
        f'<text x="4" y="{_row({"layers": count}, layer) + 4:.0f}" fill="#666666">{name}</text>'
        for layer, name in names.items()
    ]


def _edges(graph: dict[str, Any], places: list[tuple[float, float]]) -> list[str]:
    largest = max((abs(weight) for *_, weight in graph["edges"]), default=1.0)
    lines = []
    for source, target, weight in sorted(graph["edges"], key=lambda edge: abs(edge[2])):
        (a, b), (c, d) = places[source], places[target]
        share = abs(weight) / largest
        start, end = b - BOX / 2, d + BOX / 2
        lines.append(
            f'<path d="M{a:.0f} {start:.0f}C{a:.0f} {b - ROW:.0f} {c:.0f} {d + ROW:.0f} {c:.0f} {end:.0f}" '
            f'fill="none" stroke="{POSITIVE if weight > 0 else NEGATIVE}" stroke-width="{0.4 + 3 * share:.2f}" '
            f'opacity="{0.25 + 0.6 * share:.2f}"/>'
        )
    return lines


def _nodes(graph: dict[str, Any], places: list[tuple[float, float]]) -> list[str]:
    """Latents as dots that say their number, errors as squares, tokens as words."""
    lines = []
    for (kind, layer, _, name), (x, y) in zip(graph["nodes"], places, strict=True):
        if kind == "error":
            lines.append(f'<rect x="{x - 4:.0f}" y="{y - 4:.0f}" width="8" height="8" fill="{COLOURS[kind]}"/>')
        elif kind == "latent":
            title = f"<title>layer {layer}, latent {name}</title>"
            lines.append(f'<circle cx="{x:.0f}" cy="{y:.0f}" r="4.5" fill="{COLOURS[kind]}">{title}</circle>')
        else:
            text = (name.strip() or repr(name)[1:-1].rstrip())[:LONGEST]
            wide = 7 * len(text) + 6
            lines.append(
                f'<rect x="{x - wide / 2:.0f}" y="{y - BOX / 2:.0f}" width="{wide}" height="{BOX}" rx="4" '
                f'fill="{COLOURS[kind]}"/><text x="{x:.0f}" y="{y + 4:.0f}" fill="#ffffff" text-anchor="middle" '
                f'font-family="monospace">{escape(text)}</text>'
            )
    return lines


def _legend(graph: dict[str, Any]) -> list[str]:
    shown = f"{len(graph['nodes'])} nodes and {len(graph['edges'])} edges after circuit-tracer's pruning"
    lines = [f'<text x="4" y="18" font-size="13" fill="#222222">{shown}</text>']
    for number, (kind, name) in enumerate(NAMES.items()):
        x = WIDTH - 560 + (0, 70, 240, 310)[number]
        lines.append(f'<rect x="{x}" y="9" width="10" height="10" fill="{COLOURS[kind]}"/>')
        lines.append(f'<text x="{x + 14}" y="18" fill="#444444">{name}</text>')
    return lines


def main() -> None:
    """Draw the picture of a file that `graph.py` left."""
    graph, out = map(Path, sys.argv[1:])
    out.write_text(draw(json.loads(graph.read_text())["picture"]))


if __name__ == "__main__":
    main()
