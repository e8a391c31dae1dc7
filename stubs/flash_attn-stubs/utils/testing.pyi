# Written by stubs/make.py.
from flash_attn.bert_padding import pad_input as pad_input
from flash_attn.bert_padding import unpad_input as unpad_input
from flash_attn_shim.presents.flash_attn.utils.testing import _descale as _descale
from flash_attn_shim.presents.flash_attn.utils.testing import _positions as _positions
from flash_attn_shim.presents.flash_attn.utils.testing import attention_ref as attention_ref
from flash_attn_shim.presents.flash_attn.utils.testing import construct_chunk_mask as construct_chunk_mask
from flash_attn_shim.presents.flash_attn.utils.testing import construct_local_mask as construct_local_mask
from flash_attn_shim.presents.flash_attn.utils.testing import generate_qkv as generate_qkv
from flash_attn_shim.presents.flash_attn.utils.testing import generate_random_padding_mask as generate_random_padding_mask
