"""The expert load as a picture of layers and experts, for wandb; report.html draws its own."""

import io
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

# dead experts blue, an even share grey, crowded ones orange: also told apart by those who see no red
LOAD_COLOURS = LinearSegmentedColormap.from_list("load", ["#2b5f9e", "#9aa0a6", "#d9822b"])


def over_even_share(shares: Any) -> Any:
    """Return each expert's share as a multiple of its layer's mean; 0 where a layer saw nothing. [layers, experts]."""
    load = np.asarray(shares, dtype=np.float64)
    mean = load.mean(axis=1, keepdims=True)
    return np.divide(load, mean, out=np.zeros_like(load), where=mean > 0)


def load_picture(expert_load: dict[str, Any]) -> Image.Image:
    """Draw the content of expert_load.json. Not left as a Figure: wandb would look for pyplot to recognise it."""
    layers = expert_load["layers"]
    load = over_even_share([layer["share"] for layer in layers])
    most = max(2.0, float(load.max()))
    figure = Figure(figsize=(10, 1.2 + 0.22 * len(layers)), dpi=90, layout="constrained")
    axes = figure.subplots()
    norm = TwoSlopeNorm(vmin=0, vcenter=1, vmax=most)
    image = axes.imshow(load, cmap=LOAD_COLOURS, norm=norm, aspect="auto", interpolation="nearest")
    bar = figure.colorbar(image, ax=axes, pad=0.01, ticks=[0, 1, most])
    bar.ax.set_yticklabels(["0", "even", f"{most:.2g}×"])
    every = -(-len(layers) // 24)
    axes.set_yticks(range(0, len(layers), every), [row["name"] for row in layers[::every]])
    axes.xaxis.set_major_locator(MaxNLocator(16, integer=True))
    axes.set_xlabel("expert")
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return Image.open(png)
