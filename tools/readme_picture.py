"""Draws ``docs/speed.png`` from ``docs/measured/models.json``: tokens a second beside llama.cpp and transformers (``make readme``)."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.pyplot as plt

DOCS = Path(__file__).resolve().parent.parent / "docs"
COLOURS = {"Linstate": "#2b6cb0", "llama.cpp": "#b7b7b7", "transformers": "#e0c9a6"}


def main() -> None:
    measured = json.loads((DOCS / "measured" / "models.json").read_text("utf-8"))
    kinds = [key for key in measured["models"][0] if key != "name"]
    figure, axes = plt.subplots(1, len(kinds), figsize=(10, 3.2), layout="constrained")
    for axis, kind in zip(axes, kinds, strict=True):
        for at, model in enumerate(measured["models"]):
            found = model[kind]
            for number, (name, colour) in enumerate(COLOURS.items()):
                if name in found:
                    bar = axis.bar(at + 0.27 * (number - 1), found[name], 0.25, color=colour, label=name)
                    axis.bar_label(bar, fmt="%.0f", fontsize=7)
        names, drawn = axis.get_legend_handles_labels()[::-1]
        if axis is axes[0]:
            unique = dict(zip(names, drawn, strict=True))
            axis.legend(unique.values(), unique.keys(), frameon=False, fontsize=8)
        axis.set_title(kind, fontsize=10)
        axis.set_xticks(range(len(measured["models"])), [m["name"] for m in measured["models"]], fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(axis="y", labelsize=8)
    axes[0].set_ylabel("tokens a second", fontsize=9)
    figure.savefig(DOCS / "speed.png", dpi=110)


if __name__ == "__main__":
    main()
