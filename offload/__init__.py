"""What autograd saves, kept small."""

from offload.errors import StaleTensorError, StoreError
from offload.stats import Stats
from offload.store import SavedTensorStore

__all__ = ["SavedTensorStore", "StaleTensorError", "Stats", "StoreError"]
