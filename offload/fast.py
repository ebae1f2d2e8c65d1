"""The short way of a save by reference, its booking, and who reads one: `_fast.c`, `_books.c`, `_reader.c`.

None where there was no C compiler to install them. They change no result, only the time of a save.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from offload import _fast

Books: "type[_fast.Books] | None"
Packer: "type[_fast.Packer] | None"
Reader: "type[_fast.Reader] | None"
try:
    from offload._fast import Books, Packer, Reader
except ImportError:
    Books = Packer = Reader = None
