"""The recurrences: one room each, with its definition, its chunked form and its step.

``o, state = op(q, k, v, ..., initial_state=None, cu_seqlens=None, snapshots=None)``. With ``snapshots=n`` an op on a
recurrent state (:func:`linear_attention`, :func:`delta_rule`, :func:`dplr`, :func:`selective_scan`) returns the states after
every n tokens in place of the last alone, ``[B, N, Hv, K, V]``: prefixes to go on from. (The state of
:func:`causal_conv1d` there is a slice of its input.)
"""

from linstate.ops.causal_conv1d import causal_conv1d
from linstate.ops.delta_rule import delta_rule
from linstate.ops.dplr import dplr
from linstate.ops.fused import fused
from linstate.ops.linear_attention import linear_attention
from linstate.ops.native import block as _native_block  # noqa: F401
from linstate.ops.native import matrix as _native_matrix  # noqa: F401  # enters its kernels into the table
from linstate.ops.native import mixer as _native_mixer  # noqa: F401
from linstate.ops.native import scan as _native_scan  # noqa: F401
from linstate.ops.native import step as _native_step  # noqa: F401
from linstate.ops.segment import Segment, summarise
from linstate.ops.selective_scan import selective_scan
from linstate.ops.softmax_attention import softmax_attention
from linstate.ops.state_space import state_space
from linstate.ops.test_time_training import test_time_training
from linstate.ops.triton import matrix_gradient as _triton_matrix  # noqa: F401
from linstate.ops.triton import mixer as _triton_mixer  # noqa: F401
from linstate.ops.triton import scan as _triton_scan  # noqa: F401
from linstate.ops.triton import step as _triton_step  # noqa: F401

__all__ = [
    "Segment",
    "causal_conv1d",
    "delta_rule",
    "dplr",
    "fused",
    "linear_attention",
    "selective_scan",
    "softmax_attention",
    "state_space",
    "summarise",
    "test_time_training",
]
