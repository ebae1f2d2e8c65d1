"""What the codecs may take as a key: saved 16-bit tensors, and 16-bit parameters that saves come from."""

import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from offload.codecs.candidates import Candidates
from offload.errors import StoreError
from offload.handle import Entry, Handle, Kept, kept_of
from offload.layout import Layout
from offload.select import plain_storage

_NUM_NODES = 16
"""Nodes of the graph to look at: a cast, a few views and an operation or two on each side."""
_NUM_WAITING = 1 << 12
"""Offers that nobody asked for yet; earlier ones are forgotten."""

Find = Callable[[], Handle | Kept | None]


class Offers:
    """Tells `candidates` of tensors, each with how to find what autograd keeps for it, weakly. Not before a
    codec asks for some: in most steps none does.
    """

    def __init__(self, candidates: Candidates) -> None:
        self._candidates = candidates
        self.waiting: deque[tuple[Find, int]] = deque(maxlen=_NUM_WAITING)
        candidates.on_asked = self._tell

    def offer_kept(self, kept: Kept, *, kept_bytes: int) -> None:
        """Offer a save by reference, which keeps `kept_bytes` alive; 0 for a parameter."""
        self.waiting.append((weakref.ref(kept), kept_bytes))

    def offer_entry(self, entry: Entry, layout: Layout, *, kept_bytes: int) -> None:
        """Offer a settled entry, if it is a reference: a payload by a key leads to no other."""
        if layout.dtype.itemsize == 2:
            self.waiting.append((_finder(entry, layout), kept_bytes))

    def offer_parameters(self, tensor: Tensor) -> None:
        """Offer the parameters that `tensor` was computed from: a cast to float32 saves none of them."""
        for parameter in _parameters_behind(tensor):
            if parameter.element_size() == 2:
                self.waiting.append((_parameter_finder(parameter), 0))

    def _tell(self) -> None:
        while self.waiting:
            find, kept_bytes = self.waiting.popleft()
            keeper = find()
            if keeper is None or not keeper.is_reference:
                continue
            try:
                tensor = keeper.open()
            except StoreError:
                continue
            if plain_storage(tensor) is not None:
                self._candidates.add(tensor, find=find, kept_bytes=kept_bytes)


def _finder(entry: Entry, layout: Layout) -> Find:
    living = weakref.ref(entry)

    def find() -> Handle | None:
        entry = living()
        return Handle(entry, layout=layout) if entry is not None else None

    return find


def _parameter_finder(parameter: nn.Parameter) -> Find:
    living = weakref.ref(parameter)

    def find() -> Kept | None:
        parameter = living()
        return kept_of(parameter.detach()) if parameter is not None else None

    return find


def _parameters_behind(tensor: Tensor) -> Iterator[nn.Parameter]:
    nodes: deque[Any] = deque([tensor.grad_fn])
    for _ in range(_NUM_NODES):
        node = nodes.popleft() if nodes else None
        if node is None:
            return
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, nn.Parameter):
            yield leaf
        nodes += (each for each, _ in node.next_functions if each is not None)
