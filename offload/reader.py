"""Who reads a saved tensor: torch's own operators that write to nothing they saved are lent the store's
bytes, everybody else gets a copy.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch.autograd import graph

from offload import fast

# Not every one of torch's: the backward of a recurrent network by cuDNN writes to what it saved.
_NAMES = """
Addmm Baddbmm Bmm Linear Mm Mul Div Silu Gelu Sigmoid Tanh Relu Softmax LogSoftmax NativeLayerNorm Rsqrt
ScaledDotProductFlashAttentionForCpu
"""
_NODES = frozenset(
    node
    for name in [f"{each}Backward0" for each in _NAMES.split()] + ["PowBackward0", "PowBackward1"]
    if (node := getattr(getattr(torch._C, "_functions", None), name, None)) is not None
)
"""The types of the nodes, by identity: a node of somebody else's C++ may have any name."""

_current_node = getattr(torch._C, "_current_autograd_node", None)  # private; without it everybody gets a copy
_num_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
_running_code = getattr(getattr(graph, "_engine_run_backward", None), "__code__", None)
_PACKAGE = f"{Path(__file__).parent}{os.sep}"


def tell() -> bool:
    """Return whether the tensor that is being unpacked goes to nobody but a node that only reads it.

    With grad mode on (`create_graph`) a second graph would save it, so then it does not.
    """
    if _current_node is None or torch.is_grad_enabled() or type(_current_node()) not in _NODES:
        return False
    if _num_modes():  # a mode gets what the node hands to its operators
        return False
    # While such a node runs, a mode's Python may look at what another one saved.
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    # A thread of the engine has no frame above the hook's.
    return frame.f_code is _running_code or frame.f_code.co_filename.startswith(_PACKAGE)


def _teller() -> Callable[[], bool]:
    if fast.Reader is None or _current_node is None:
        return tell
    return fast.Reader(
        current_node=_current_node,
        is_grad_enabled=torch.is_grad_enabled,
        num_modes=_num_modes,
        nodes=_NODES,
        running_code=_running_code,
        package=_PACKAGE,
    )


only_reads = _teller()
"""As `tell`, in C where it was compiled."""
