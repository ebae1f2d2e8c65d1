"""Saves that are kept by reference, as plain autograd keeps all of them."""

import weakref

import torch
from torch import Tensor
from torch._C._autograd import _get_sequence_nr

from offload.handle import Kept, kept_of
from offload.layout import lift
from offload.ledger import Charge, Ledger
from offload.offers import Offers
from offload.patience import Line
from offload.pending import Late, Queue
from offload.stats import Row


class References:
    """Keeps tensors by reference, charges them, and tells the codecs what may serve as a key."""

    def __init__(self, *, ledger: Ledger, queue: Queue, offers: Offers | None, dedupe: bool) -> None:
        self._ledger = ledger
        self._queue = queue
        self._offers = offers
        self._dedupe = dedupe

    def keep_apart(self, tensor: Tensor) -> Kept:
        """Keep a parameter, or what has no plain storage: no stage touches it."""
        kept = kept_of(tensor.detach())
        self._offer(kept, tensor.dtype, kept_bytes=0)
        return kept

    def keep(self, alias: Tensor, storage: torch.UntypedStorage, *, num_bytes: int, row: Row) -> Kept:
        """Keep a plain tensor for good, `num_bytes` large its storage."""
        if self._dedupe:
            kept = kept_of(alias, num_bytes=num_bytes)
            self._ledger.claim(kept, key=id(storage), num_bytes=num_bytes, storage_bytes=num_bytes, row=row)
        else:
            charge = self.charge(alias, storage, storage_bytes=num_bytes, row=row)
            kept = kept_of(alias, num_bytes=num_bytes, charge=charge)
        self._offer(kept, alias.dtype, kept_bytes=num_bytes)
        return kept

    def keep_late(
        self, alias: Tensor, storage: torch.UntypedStorage, *, num_bytes: int, row: Row, line: Line
    ) -> Kept:
        """Keep a plain tensor until its operator has returned."""
        kept = kept_of(alias, num_bytes=num_bytes, is_late=True)
        key = id(storage)
        kept.claim = self._ledger.claim(kept, key=key, num_bytes=num_bytes, storage_bytes=num_bytes)
        self._queue.put(Late(_get_sequence_nr(), weakref.ref(kept), row, line, kept.claim, num_bytes))
        return kept

    def charge(
        self, alias: Tensor, storage: torch.UntypedStorage, *, storage_bytes: int, row: Row | None = None
    ) -> Charge:
        """Return the charge for a save by reference: its storage's, or without dedupe its own."""
        ledger = self._ledger
        if self._dedupe:
            return ledger.charge(storage.nbytes(), key=id(storage), storage_bytes=storage_bytes, row=row)
        charge = ledger.charge(min(lift(alias)[0].span_bytes(), alias.nbytes), row=row)
        ledger.claim(charge, key=id(storage), num_bytes=0, storage_bytes=storage_bytes)  # to be counted
        return charge

    def _offer(self, kept: Kept, dtype: torch.dtype, *, kept_bytes: int) -> None:
        if self._offers is not None and dtype.itemsize == 2:
            self._offers.offer_kept(kept, kept_bytes=kept_bytes)
