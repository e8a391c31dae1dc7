# Written by stubs/make.py.
from flash_attn_shim.presents.flash_attn.ops.activations import FastGeLUFunction as FastGeLUFunction
from flash_attn_shim.presents.flash_attn.ops.activations import GeLUFunction as GeLUFunction
from flash_attn_shim.presents.flash_attn.ops.activations import SwiGLUFunction as SwiGLUFunction
from flash_attn_shim.presents.flash_attn.ops.activations import bias_gelu as bias_gelu
from flash_attn_shim.presents.flash_attn.ops.activations import bias_gelu_back as bias_gelu_back
from flash_attn_shim.presents.flash_attn.ops.activations import bias_gelu_impl as bias_gelu_impl
from flash_attn_shim.presents.flash_attn.ops.activations import fast_gelu_impl as fast_gelu_impl
from flash_attn_shim.presents.flash_attn.ops.activations import gelu_bwd as gelu_bwd
from flash_attn_shim.presents.flash_attn.ops.activations import gelu_fwd as gelu_fwd
from flash_attn_shim.presents.flash_attn.ops.activations import relu_bwd as relu_bwd
from flash_attn_shim.presents.flash_attn.ops.activations import sqrelu_bwd as sqrelu_bwd
from flash_attn_shim.presents.flash_attn.ops.activations import sqrelu_fwd as sqrelu_fwd
from flash_attn_shim.presents.flash_attn.ops.activations import swiglu as swiglu
from flash_attn_shim.presents.flash_attn.ops.activations import swiglu_bwd as swiglu_bwd
from flash_attn_shim.presents.flash_attn.ops.activations import swiglu_fwd as swiglu_fwd
