# Written by stubs/make.py.
from flash_attn_shim.presents.flash_attn.utils.pretrained import _load as _load
from flash_attn_shim.presents.flash_attn.utils.pretrained import _weight_files as _weight_files
from flash_attn_shim.presents.flash_attn.utils.pretrained import state_dict_from_pretrained as state_dict_from_pretrained
