# Written by stubs/make.py.
from flash_attn.ops.activations import swiglu as swiglu
from flash_attn.ops.fused_dense import ColumnParallelLinear as ColumnParallelLinear
from flash_attn.ops.fused_dense import FusedMLP as FusedMLP
from flash_attn.ops.fused_dense import ParallelFusedMLP as ParallelFusedMLP
from flash_attn.ops.fused_dense import RowParallelLinear as RowParallelLinear
from flash_attn_shim.presents.flash_attn.modules.mlp import GatedMlp as GatedMlp
from flash_attn_shim.presents.flash_attn.modules.mlp import Mlp as Mlp
from flash_attn_shim.presents.flash_attn.modules.mlp import ParallelGatedMlp as ParallelGatedMlp
from flash_attn_shim.presents.flash_attn.modules.mlp import ParallelMLP as ParallelMLP
from flash_attn_shim.presents.flash_attn.modules.mlp import _gate as _gate
from flash_attn_shim.presents.flash_attn.modules.mlp import _gated_features as _gated_features
