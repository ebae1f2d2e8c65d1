"""The short way of a save by reference, `offload/_fast.c`, where a C compiler was there to install it; None
where not. It changes no result, only the time of a save.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from offload._fast import Packer as _Packer

Packer: "type[_Packer] | None"
try:
    from offload._fast import Packer
except ImportError:
    Packer = None
