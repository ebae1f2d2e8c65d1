"""Which lines of code are worth reading: hashing and sampling cost a few percent of a step, on most lines for
nothing.
"""

_NUM_LOST = 8
_MOST_SKIPPED = 32


class Patience:
    """How a line of code has fared: it is read until its saves won nothing eight times in a row, then now and
    then.

    Between two readings 1, 2, 4 ... 32 saves are skipped; one that wins makes the line worth reading again.
    What is skipped is kept by reference, as plain autograd does.
    """

    __slots__ = ("_num_lost", "_num_skipped")

    def __init__(self) -> None:
        self._num_lost = 0
        self._num_skipped = 0

    def is_worth_reading(self) -> bool:
        """Return whether to read the save that comes now."""
        excess = self._num_lost - _NUM_LOST
        if excess < 0 or self._num_skipped >= min(_MOST_SKIPPED, 1 << min(excess, 5)):
            self._num_skipped = 0
            return True
        self._num_skipped += 1
        return False

    def learn(self, *, won: bool) -> None:
        """Take note of what reading a save came to."""
        self._num_lost = 0 if won else self._num_lost + 1
