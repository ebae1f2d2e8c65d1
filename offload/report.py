"""The report of a store, for people."""

from collections.abc import Sequence

from offload.stats import Row, Stats

_NUM_ROWS = 20


def report_text(stats: Stats, rows: Sequence[Row]) -> str:
    """Return totals, then a line for each of the 20 rows that saved most: where, what, how much, and what
    became of it.
    """
    lines = [
        f"saved {human_bytes(stats.saved_bytes)} in {stats.num_saved} tensors, "
        f"on {human_bytes(stats.storage_bytes)} of storage; held {human_bytes(stats.held_bytes)}, "
        f"at most {human_bytes(stats.peak_held_bytes)}"
    ]
    shown = sorted(rows, key=lambda row: -row.saved_bytes)[:_NUM_ROWS]
    if shown:
        width = max(len(row.site) for row in shown)
        lines += [f"{'saved':>11} {'kept':>11} {'num':>5}  {'by':<{width}}  what"] + [
            _row_text(row, width) for row in shown
        ]
    if len(rows) > len(shown):
        lines.append(f"and {len(rows) - len(shown)} smaller rows")
    return "\n".join(lines)


def human_bytes(num_bytes: int) -> str:
    """Return a size in the largest unit that leaves at least one whole."""
    size, unit = float(num_bytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{num_bytes} B" if unit == "B" else f"{size:.1f} {unit}"


def _row_text(row: Row, width: int) -> str:
    dtype = str(row.dtype).removeprefix("torch.")
    fate = ", ".join(f"{stage} {num}" for stage, num in sorted(row.num_by_stage.items()))
    sizes = f"{human_bytes(row.saved_bytes):>11} {human_bytes(row.kept_bytes):>11} {row.num_saved:>5}"
    return f"{sizes}  {row.site:<{width}}  {dtype}{list(row.shape)}: {fate}"
