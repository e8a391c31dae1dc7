# Written by stubs/make.py.
from flash_attn_shim.presents.flash_attn.ops.triton.k_activations import Activation as Activation
from flash_attn_shim.presents.flash_attn.ops.triton.k_activations import _KERNELS as _KERNELS
from flash_attn_shim.presents.flash_attn.ops.triton.k_activations import cosh as cosh
from flash_attn_shim.presents.flash_attn.ops.triton.k_activations import gelu as gelu
from flash_attn_shim.presents.flash_attn.ops.triton.k_activations import gelu_approx as gelu_approx
from flash_attn_shim.presents.flash_attn.ops.triton.k_activations import gelu_approx_grad as gelu_approx_grad
from flash_attn_shim.presents.flash_attn.ops.triton.k_activations import gelu_grad as gelu_grad
from flash_attn_shim.presents.flash_attn.ops.triton.k_activations import get_triton_activation_bwd_kernel as get_triton_activation_bwd_kernel
from flash_attn_shim.presents.flash_attn.ops.triton.k_activations import get_triton_activation_kernel as get_triton_activation_kernel
from flash_attn_shim.presents.flash_attn.ops.triton.k_activations import leaky_relu as leaky_relu
from flash_attn_shim.presents.flash_attn.ops.triton.k_activations import leaky_relu_grad as leaky_relu_grad
from flash_attn_shim.presents.flash_attn.ops.triton.k_activations import relu as relu
from flash_attn_shim.presents.flash_attn.ops.triton.k_activations import relu_grad as relu_grad
from flash_attn_shim.presents.flash_attn.ops.triton.k_activations import squared_relu as squared_relu
from flash_attn_shim.presents.flash_attn.ops.triton.k_activations import squared_relu_grad as squared_relu_grad
from flash_attn_shim.presents.flash_attn.ops.triton.k_activations import tanh as tanh
