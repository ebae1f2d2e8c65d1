"""What the codecs may take as a key: saved 16-bit tensors, and 16-bit parameters that saves come from."""

import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from offload.codecs.candidates import Candidates
from offload.handle import Entry, Handle, Kept, Reference
from offload.layout import Layout, lay
from offload.select import has_plain_storage

_NUM_NODES = 16
"""Nodes of the graph to look at: a cast, a few views and an operation or two on each side."""


class Offers:
    """Tells `candidates` of tensors, each with how to find what autograd keeps for it, weakly."""

    def __init__(self, candidates: Candidates) -> None:
        self._candidates = candidates

    def offer_kept(self, kept: Kept, *, num_bytes: int) -> None:
        """Offer a save by reference, which keeps `num_bytes` alive; 0 for a parameter."""
        alias = kept.open()
        if has_plain_storage(alias):
            self._candidates.add(alias, find=weakref.ref(kept), kept_bytes=num_bytes)

    def offer_entry(self, entry: Entry, layout: Layout, *, num_bytes: int) -> None:
        """Offer an entry that settled as a reference, or nothing: a payload by a key leads to no other."""
        if isinstance(entry.content, Reference):
            alias = lay(layout, entry.content.source)
            self._candidates.add(alias, find=_finder(entry, layout), kept_bytes=num_bytes)

    def offer_parameters(self, tensor: Tensor) -> None:
        """Offer the parameters that `tensor` was computed from: a cast to float32 saves none of them."""
        for parameter in _parameters_behind(tensor):
            alias = parameter.detach()
            if alias.element_size() == 2 and has_plain_storage(alias):
                self._candidates.add(alias, find=_parameter_finder(parameter), kept_bytes=0)


def _finder(entry: Entry, layout: Layout) -> Callable[[], Handle | None]:
    living = weakref.ref(entry)

    def find() -> Handle | None:
        entry = living()
        return Handle(entry, layout=layout) if entry is not None else None

    return find


def _parameter_finder(parameter: nn.Parameter) -> Callable[[], Kept | None]:
    living = weakref.ref(parameter)

    def find() -> Kept | None:
        parameter = living()
        return Kept(parameter.detach()) if parameter is not None else None

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
