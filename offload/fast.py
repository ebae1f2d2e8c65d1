"""The short way of a save by reference, and its booking: `_fast.c` and `_books.c`; None where there was no C
compiler to install them. They change no result, only the time of a save.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from offload import _fast

Books: "type[_fast.Books] | None"
Packer: "type[_fast.Packer] | None"
try:
    from offload._fast import Books, Packer
except ImportError:
    Books = Packer = None
