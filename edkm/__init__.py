"""Differentiable k-means: weights that are trained on a palette, and the files they end up in."""

from edkm.cluster import cluster
from edkm.clustering import Clustering
from edkm.config import DKMConfig
from edkm.dkm import dkm
from edkm.errors import PaletteError
from edkm.fused import fused_dkm
from edkm.load import load_palettized
from edkm.palette import Palette
from edkm.palettize import palettize
from edkm.palettized import PalettizedEmbedding, PalettizedLinear
from edkm.save import save_palettized

__all__ = [
    "DKMConfig",
    "Clustering",
    "dkm",
    "fused_dkm",
    "cluster",
    "palettize",
    "save_palettized",
    "load_palettized",
    "Palette",
    "PalettizedLinear",
    "PalettizedEmbedding",
    "PaletteError",
]
