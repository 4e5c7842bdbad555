"""Expert load heat map (layers × experts) as an image for wandb; report.html draws it as SVG."""

import io
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

# dead experts blue, mean load gray, overloaded experts orange; distinguishable with color vision deficiency
LOAD_COLORS = LinearSegmentedColormap.from_list("load", ["#2b5f9e", "#9aa0a6", "#d9822b"])


def relative_expert_load(shares: Any) -> Any:
    """Return each expert's load over its layer's mean, 0 for a layer without tokens. Shape: [layers, experts]."""
    load = np.asarray(shares, dtype=np.float64)
    mean = load.mean(axis=1, keepdims=True)
    return np.divide(load, mean, out=np.zeros_like(load), where=mean > 0)


def draw_expert_load(expert_load: dict[str, Any]) -> Image.Image:
    """Return the content of expert_load.json as an image.

    An image rather than a Figure, because wandb imports pyplot to recognize figures.
    """
    layers = expert_load["layers"]
    load = relative_expert_load([layer["share"] for layer in layers])
    max_load = max(2.0, float(load.max()))
    figure = Figure(figsize=(10, 1.2 + 0.22 * len(layers)), dpi=90, layout="constrained")
    axes = figure.subplots()
    norm = TwoSlopeNorm(vmin=0, vcenter=1, vmax=max_load)
    image = axes.imshow(load, cmap=LOAD_COLORS, norm=norm, aspect="auto", interpolation="nearest")
    bar = figure.colorbar(image, ax=axes, pad=0.01, ticks=[0, 1, max_load])
    bar.ax.set_yticklabels(["0", "mean", f"{max_load:.2g}×"])
    stride = -(-len(layers) // 24)
    axes.set_yticks(range(0, len(layers), stride), [row["name"] for row in layers[::stride]])
    axes.xaxis.set_major_locator(MaxNLocator(16, integer=True))
    axes.set_xlabel("expert")
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return Image.open(png)
