"""What autograd saves, kept small."""

from offload.errors import RankMismatchError, StaleTensorError, StoreError
from offload.stats import Stats
from offload.store import SavedTensorStore

__all__ = ["RankMismatchError", "SavedTensorStore", "StaleTensorError", "Stats", "StoreError"]
