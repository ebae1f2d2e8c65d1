"""Which lines of code are worth a stage's time: hashing and sampling cost a few percent of a step, on most
lines for nothing.
"""

_NUM_LOST = 8
_LEAST_SKIPPED = 8
_MOST_SKIPPED = 1024


class Patience:
    """How a line of code has fared with a stage: it is tried until it won nothing eight times in a row, then
    now and then.

    Between two trials 8, 16 ... 1024 saves are skipped; one that wins makes the line worth trying again.
    """

    __slots__ = ("_gap", "_num_lost", "num_to_skip")

    def __init__(self) -> None:
        self._num_lost = 0
        self._gap = 0
        self.num_to_skip = 0

    @property
    def is_hopeful(self) -> bool:
        """Whether it did not yet win nothing eight times in a row."""
        return self._num_lost < _NUM_LOST

    @property
    def is_winning(self) -> bool:
        """Whether no save is skipped."""
        return not self._gap

    def is_worth_trying(self) -> bool:
        """Return whether to try the save that comes now."""
        if self.num_to_skip:
            self.num_to_skip -= 1
            return False
        self.num_to_skip = self._gap  # what this trial comes to is learnt later
        return True

    def learn(self, *, won: bool) -> None:
        """Take note of what trying a save came to."""
        self._num_lost = 0 if won else self._num_lost + 1
        excess = min(self._num_lost - _NUM_LOST, 7)
        self._gap = self.num_to_skip = min(_MOST_SKIPPED, _LEAST_SKIPPED << excess) if excess >= 0 else 0


class Line:
    """What a store has learnt of the saves of one line of code and dtype, from step to step.

    `reading` is for their bytes at all: saves that are not read are kept by reference, as plain autograd
    does. `encoding` is for the codecs, and `codec` the name of the one that won last; `others` is for asking
    those that might win more than that one, and `matching` for hashing what it is sure to win. `is_shared`
    says whether other ranks held the last save too, `is_sole` whether nobody else had its storage once its
    operator had returned, and `is_late` whether the next one is looked at only then.
    """

    __slots__ = ("codec", "encoding", "is_late", "is_shared", "is_sole", "matching", "others", "reading")

    def __init__(self) -> None:
        self.reading = Patience()
        self.matching = Patience()
        self.encoding = Patience()
        self.others = Patience()
        self.codec: str | None = None
        self.is_shared = False
        self.is_sole = False
        self.is_late = False
