from collections import deque
from collections.abc import Callable
from types import CodeType
from typing import Any

from torch import Tensor

class Books:
    held: dict[int, Any]
    living: dict[int, Any]
    held_bytes: int
    peak_bytes: int
    storage_bytes: int
    def __init__(self, log: deque[Any], *, row: type) -> None: ...
    def begin_step(self) -> None: ...
    def book(self) -> None: ...

class Reader:
    def __init__(
        self,
        *,
        current_node: Callable[[], Any],
        is_grad_enabled: Callable[[], bool],
        num_modes: Callable[[], int],
        nodes: frozenset[type],
        running_code: CodeType | None,
        package: str,
    ) -> None: ...
    def __call__(self) -> bool: ...

class Packer:
    room_bytes: int
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
        arrivals: deque[Any],
        late: type,
        sequence_nr: Callable[[], int],
        least_bytes: int,
        min_bytes: int,
        most_lines: int,
    ) -> None: ...
    def pack(self, tensor: Tensor) -> Any: ...
