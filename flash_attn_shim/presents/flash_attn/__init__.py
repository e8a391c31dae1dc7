"""FlashAttention 2 for Apple silicon, under the name that programs import: presented by mtlflashattn, served by
`flash_attn_mps`. `help(flash_attn.flash_attn_func)` has the semantics, in full in `flash_attn_mps.problem`.

Importing this package does not import torch; taking a function from it does.
"""

from flash_attn_shim import policy as _policy
from flash_attn_shim.guests.presented import present as _present

_present(__name__)

__version__ = _policy.FLASH_ATTN_VERSION

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]


def __getattr__(name):
    # Upstream's __init__ imports flash_attn_interface, so that is an attribute without anybody having imported it.
    if name in __all__ or name == "flash_attn_interface":
        import flash_attn.flash_attn_interface as interface

        value = interface if name == "flash_attn_interface" else getattr(interface, name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *__all__, "flash_attn_interface"})
