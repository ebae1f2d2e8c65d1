"""What goes wrong with weights, palettes and their files; wrong arguments are ValueError or TypeError."""


class PaletteError(RuntimeError):
    """A weight cannot be put on a palette, or a palettized file is not what it says it is."""
