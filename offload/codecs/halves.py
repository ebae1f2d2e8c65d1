"""Float32 made from bfloat16: the upper halves of scalars, by `_halves.c`; None where it was not compiled."""

from collections.abc import Callable

upper_halves: Callable[[int, int, int], bool] | None
try:
    from offload.codecs._halves import upper_halves
except ImportError:
    upper_halves = None
