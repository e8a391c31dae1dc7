# Written by stubs/make.py.
from flash_attn_shim.presents.flash_attn.utils.torch import _device_type as _device_type
from flash_attn_shim.presents.flash_attn.utils.torch import custom_amp_decorator as custom_amp_decorator
from flash_attn_shim.presents.flash_attn.utils.torch import custom_bwd as custom_bwd
from flash_attn_shim.presents.flash_attn.utils.torch import custom_fwd as custom_fwd
from flash_attn_shim.presents.flash_attn.utils.torch import deprecated as deprecated
