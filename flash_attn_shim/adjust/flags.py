"""Flags of programs that would otherwise break because the shim is there, as data. `programs.py` applies them.

* Wan's attention file, and the many copies of it, ends in `scaled_dot_product_attention` where neither flash_attn nor
  flash_attn_interface can be imported; where one can, it takes a path that asserts CUDA tensors. With the flag off it
  keeps the path that works.
* Programs written for early builds of FlashAttention 3 index what its functions return with [0], or unpack it. Today's
  FlashAttention 3 returns a tensor, and so does ours. With the flag off they take their FlashAttention 2 path.

A module is named by the end of its dotted name: copies lie under other packages, and custom nodes of ComfyUI under the
path they were loaded from.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import ModuleType

FA2 = "flash_attn"
FA3 = "flash_attn_interface"


def asserts_cuda_before_falling_back(module: ModuleType) -> bool:
    """Does a function for flash attention ask for CUDA, while a function of the module has another way?

    By the names in their bytecode: copies that allow MPS say `in ("cuda", "mps")`, or have the line commented out, and
    are served by FlashAttention 2. Which functions these are differs from copy to copy, and decorators may hide them.
    """
    functions = (inspect.unwrap(value) for value in vars(module).values() if inspect.isfunction(value))
    codes = [code for code in (getattr(function, "__code__", None) for function in functions) if code is not None]
    asks = any(
        ("cuda" in code.co_consts or "is_cuda" in code.co_names)
        and any("flash_att" in name.lower() for name in (code.co_name, *code.co_names))
        for code in codes
    )
    return asks and any("scaled_dot_product_attention" in code.co_names for code in codes)


class Flag:
    """`name` in the modules whose dotted name ends in `module` becomes `value` while the shim presents `served`.

    `served`: the top-level name that makes the flag wrong; None: either of them. `applies`: takes the executed module
    and says whether it has the trait that makes the flag wrong; None: always. `reason` in words; `source`: the file and
    repository that show it. `listed`: the user asked for it.
    """

    def __init__(
        self,
        module: str,
        name: str,
        value: object,
        served: str | None,
        reason: str,
        source: str,
        applies: Callable[[ModuleType], bool] | None = None,
        listed: bool = False,
    ) -> None:
        self.module = module
        self.name = name
        self.value = value
        self.served = served
        self.reason = reason
        self.source = source
        self.applies = applies
        self.listed = listed

    def matches(self, fullname: str) -> bool:
        return fullname == self.module or fullname.endswith("." + self.module)

    def __str__(self):
        return f"{self.module}:{self.name}={self.value}"


def _cuda_only(module, source):
    return Flag(
        module,
        "FLASH_ATTN_2_AVAILABLE",
        False,
        FA2,
        "its flash_attention asserts CUDA tensors; without the flag, attention uses scaled_dot_product_attention",
        source,
        asserts_cuda_before_falling_back,
    )


def _old_fa3(module, name, source, use="indexes the result of FlashAttention 3 with [0]"):
    return Flag(module, name, False, FA3, f"{use}; without the flag it does not use FlashAttention 3", source)


_WAN = "wan/modules/attention.py of Wan-Video/Wan2.1, Wan-Video/Wan2.2 and guandeh17/Self-Forcing"
_SKYREELS = "skyreels_v2_infer/modules/attention.py of SkyworkAI/SkyReels-V2"
_VIDEOX = "videox_fun/models/attention_utils.py of aigc-apps/VideoX-Fun"
_TRANSFORMER = "models/wan_transformer3d.py of Francis-Rings/StableAvatar, and of aigc-apps/VideoX-Fun before that"
_CAUSVID = "causvid/models/wan/wan_base/modules/attention.py of tianweiy/CausVid and chenfengxu714/StreamDiffusionV2"
_HUMO = "humo/models/wan_modules/attention.py of Phantom-video/HuMo"
_WRAPPER = "wanvideo/modules/attention.py, later attention_flash.py, of kijai/ComfyUI-WanVideoWrapper"

TABLE = (
    _cuda_only("wan.modules.attention", _WAN),
    _old_fa3("wan.modules.attention", "FLASH_ATTN_3_AVAILABLE", _WAN),
    _cuda_only("skyreels_v2_infer.modules.attention", _SKYREELS),
    _old_fa3("skyreels_v2_infer.modules.attention", "FLASH_ATTN_3_AVAILABLE", _SKYREELS),
    _cuda_only("videox_fun.models.attention_utils", _VIDEOX),
    _old_fa3("videox_fun.models.attention_utils", "FLASH_ATTN_3_AVAILABLE", _VIDEOX),
    _cuda_only("models.wan_transformer3d", _TRANSFORMER),
    _old_fa3("models.wan_transformer3d", "FLASH_ATTN_3_AVAILABLE", _TRANSFORMER),
    _cuda_only("wan_base.modules.attention", _CAUSVID),
    _old_fa3("wan_base.modules.attention", "FLASH_ATTN_3_AVAILABLE", _CAUSVID),
    _cuda_only("wan_modules.attention", _HUMO),
    _old_fa3("wan_modules.attention", "FLASH_ATTN_3_AVAILABLE", _HUMO),
    # Here the assertion is commented out, and FlashAttention 2 works.
    _old_fa3("wanvideo.modules.attention", "FLASH_ATTN_3_AVAILABLE", _WRAPPER),
    _old_fa3("wanvideo.modules.attention_flash", "FLASH_ATTN_3_AVAILABLE", _WRAPPER),
    _old_fa3("opensora.models.mmdit.math", "SUPPORT_FA3", "opensora/models/mmdit/math.py of hpcaitech/Open-Sora"),
    _old_fa3(
        "opensora.models.mmdit.distributed",
        "SUPPORT_FA3",
        "opensora/models/mmdit/distributed.py of hpcaitech/Open-Sora",
        "calls FlashAttention 3's private functions by the positions of an early build",
    ),
    _old_fa3(
        "bert_layers.attention",
        "IMPL_USE_FLASH3",
        "src/bert_layers/attention.py of AnswerDotAI/ModernBERT",
        "unpacks the result of FlashAttention 3 into two values",
    ),
)
