from collections import deque
from collections.abc import Callable
from typing import Any

from torch import Tensor

class Books:
    held: dict[int, Any]
    living: dict[int, Any]
    held_bytes: int
    peak_bytes: int
    storage_bytes: int
    charged_bytes: int
    def __init__(self, log: deque[Any], *, row: type) -> None: ...
    def begin_step(self) -> None: ...
    def book(self) -> None: ...

class Packer:
    is_due: bool
    def __init__(
        self,
        *,
        pack_whole: Callable[[Tensor], Any],
        tensor: type,
        parameter: type,
        ours: dict[str, bool],
        seen: dict[Any, Any],
        records: dict[int, Any],
        log: deque[Any],
        offers_append: Callable[[Any], None],
        wait_for: Callable[[Any, Any, Any], None],
        min_bytes: int,
        most_lines: int,
    ) -> None: ...
    def pack(self, tensor: Tensor) -> Any: ...
