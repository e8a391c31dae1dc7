# Written by stubs/make.py.
from flash_attn import flash_attn_with_kvcache as flash_attn_with_kvcache
from flash_attn_shim.presents.flash_attn.modules._cached_attention import CachedAttention as CachedAttention
from flash_attn_shim.presents.flash_attn.modules._cached_attention import update_kv_cache as update_kv_cache
