"""One codec a file; `base.py` has the contract. A new codec is a new file and a name in `DEFAULT_CODECS`."""

from offload.codecs.base import Codec
from offload.codecs.bits import Bits
from offload.codecs.cast import Cast
from offload.codecs.keyed import Keyed
from offload.codecs.rows import Rows
from offload.codecs.tensor_keyed import TensorKeyed

DEFAULT_CODECS: tuple[Codec, ...] = (TensorKeyed(), Keyed(), Cast(), Bits(), Rows())
"""In the order of their cost in time."""
