"""What the store raises at run time; wrong arguments are ValueError or TypeError."""


class StoreError(RuntimeError):
    """The store cannot give a saved tensor back as it was saved."""


class StaleTensorError(StoreError):
    """A tensor kept by reference was changed in place, or its storage shrank, after it was saved (Law 4)."""


class RankMismatchError(StoreError):
    """Ranks do not hold the same bytes where they had agreed to (Law 6)."""
