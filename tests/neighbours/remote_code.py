"""Models with code of their own, in the import patterns that are found on the Hub, as directories to load from.

The files are ours; only the manner in which each asks for flash_attn is taken from the model that names it.
`ROUTE` is how the file would attend, `attend(q, k, v)` does it; q, k, v are (batch, seqlen, heads, head_dim).
"""

import json
import textwrap

import torch
from safetensors.torch import save_file

_SOFTMAX = """
def softmax_attention(q, k, v):
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
"""

_MODEL = """
class TinyConfig(PretrainedConfig):
    model_type = "tiny-remote"

    def __init__(self, width=16, **kwargs):
        self.width = width
        super().__init__(**kwargs)


class TinyModel(PreTrainedModel):
    config_class = TinyConfig
    _supports_sdpa = _supports_flash_attn = _supports_flash_attn_2 = {supports}
    _tied_weights_keys = None

    def __init__(self, config):
        super().__init__(config)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.post_init()

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (2, -1)) for part in self.qkv(x).chunk(3, -1))
        return attend(q, k, v).flatten(2), softmax_attention(q, k, v).flatten(2)
"""

_IMPORTS = """
import importlib.metadata
import inspect
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
"""

#: Model -> its way to flash_attn.
PATTERNS = {
    # Behind transformers' probe, with the padding helpers.
    "florence-2": """
        from transformers.utils import is_flash_attn_2_available

        if is_flash_attn_2_available():
            from flash_attn import flash_attn_func, flash_attn_varlen_func
            from flash_attn.bert_padding import index_first_axis, pad_input, unpad_input

        ROUTE = "flash" if is_flash_attn_2_available() else "softmax"

        def attend(q, k, v):
            if ROUTE == "softmax":
                return softmax_attention(q, k, v)
            return flash_attn_func(q, k, v, 0.0, softmax_scale=None, causal=False)
        """,
    # In a try, and asks the signature.
    "phi-3-vision": """
        ROUTE, windows = "softmax", False
        try:
            from flash_attn import flash_attn_func, flash_attn_varlen_func
            from flash_attn.bert_padding import index_first_axis, pad_input, unpad_input
            windows = "window_size" in list(inspect.signature(flash_attn_func).parameters)
            ROUTE = "flash"
        except ImportError:
            pass

        def attend(q, k, v):
            if ROUTE == "softmax":
                return softmax_attention(q, k, v)
            assert windows
            return flash_attn_func(q, k, v, 0.0, softmax_scale=None, causal=False, window_size=(8, 8))
        """,
    # Behind the probe at the top; unpads and pads itself.
    "deepseek-vl2": """
        from transformers.utils import is_flash_attn_2_available, is_flash_attn_greater_or_equal_2_10

        if is_flash_attn_2_available():
            from flash_attn import flash_attn_func, flash_attn_varlen_func
            from flash_attn.bert_padding import index_first_axis, pad_input, unpad_input
            top_left = not is_flash_attn_greater_or_equal_2_10()

        ROUTE = "flash" if is_flash_attn_2_available() else "softmax"

        def attend(q, k, v):
            if ROUTE == "softmax":
                return softmax_attention(q, k, v)
            assert not top_left
            batch, seqlen = q.shape[:2]
            seen = torch.ones(batch, seqlen, dtype=torch.int32)
            (q, places, cu, longest), (k, *_), (v, *_) = (unpad_input(x, seen)[:4] for x in (q, k, v))
            out = flash_attn_varlen_func(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=longest,
                                         max_seqlen_k=longest, dropout_p=0.0, softmax_scale=None, causal=False)
            return pad_input(out, places, batch, seqlen)
        """,
    # FlashAttention 1's name first, then the present one; packed.
    "internvl": """
        try:
            try:
                from flash_attn.flash_attn_interface import flash_attn_unpadded_qkvpacked_func as packed_func
            except:
                from flash_attn.flash_attn_interface import flash_attn_varlen_qkvpacked_func as packed_func
            from flash_attn.bert_padding import pad_input, unpad_input
            ROUTE = "flash"
        except:
            ROUTE = "softmax"

        def attend(q, k, v):
            if ROUTE == "softmax":
                return softmax_attention(q, k, v)
            batch, seqlen = q.shape[:2]
            packed = torch.stack((q, k, v), 2).flatten(0, 1)
            cu = torch.arange(0, (batch + 1) * seqlen, seqlen, dtype=torch.int32)
            out = packed_func(packed, cu, seqlen, 0.0, softmax_scale=None, causal=False)
            return out.unflatten(0, (batch, seqlen))
        """,
    # In a try that swallows everything; what is there is looked up later.
    "minicpm-v": """
        try:
            from flash_attn import flash_attn_func, flash_attn_varlen_func
            from flash_attn.bert_padding import index_first_axis, pad_input, unpad_input
        except:
            pass

        ROUTE = "flash" if "flash_attn_func" in globals() else "softmax"

        def attend(q, k, v):
            return flash_attn_func(q, k, v) if ROUTE == "flash" else softmax_attention(q, k, v)
        """,
    # Guarded, but inside a function, where transformers does not see the guard.
    "in a function": """
        from transformers.utils import is_flash_attn_2_available
        ROUTE = "flash" if is_flash_attn_2_available() else "softmax"

        def attend(q, k, v):
            if not is_flash_attn_2_available():
                return softmax_attention(q, k, v)
            from flash_attn import flash_attn_func
            return flash_attn_func(q, k, v)
        """,
    # None in place of what is missing, one import after the other.
    "nomic-bert": """
        try:
            from flash_attn import flash_attn_func, flash_attn_qkvpacked_func, flash_attn_varlen_qkvpacked_func
            from flash_attn.bert_padding import pad_input, unpad_input
        except ImportError:
            flash_attn_func = flash_attn_qkvpacked_func = flash_attn_varlen_qkvpacked_func = None
        try:
            from flash_attn.layers.rotary import RotaryEmbedding
            from flash_attn.losses.cross_entropy import CrossEntropyLoss
            from flash_attn.ops.activations import swiglu
        except ImportError:
            RotaryEmbedding = CrossEntropyLoss = swiglu = None
        try:
            from flash_attn.ops.layer_norm import dropout_add_layer_norm
        except ImportError:
            dropout_add_layer_norm = None

        ROUTE = "softmax" if flash_attn_qkvpacked_func is None else "flash"
        assert (RotaryEmbedding is None) == (ROUTE == "softmax")

        def attend(q, k, v):
            if ROUTE == "softmax":
                return softmax_attention(q, k, v)
            return flash_attn_qkvpacked_func(torch.stack((q, k, v), 2), 0.0, softmax_scale=None, causal=False)
        """,
    # Both versions, a string comparison of the metadata's version, and FlashAttention 3 before 2.
    "modernbert-repo": """
        IMPL_USE_FLASH3 = IMPL_USE_FLASH2 = False
        try:
            from flash_attn_interface import flash_attn_varlen_func
            IMPL_USE_FLASH3 = True
        except ImportError:
            pass
        try:
            from flash_attn import flash_attn_qkvpacked_func, flash_attn_varlen_qkvpacked_func
            if importlib.metadata.version("flash_attn") < "2.5.7":
                raise ImportError("newer version of flash_attn required")
            IMPL_USE_FLASH2 = True
        except ImportError:
            pass
        try:
            from flash_attn.layers.rotary import RotaryEmbedding
        except ImportError:
            RotaryEmbedding = None

        ROUTE = "flash" if IMPL_USE_FLASH2 else "softmax"
        assert IMPL_USE_FLASH3 == IMPL_USE_FLASH2 and (RotaryEmbedding is None) == (ROUTE == "softmax")

        def attend(q, k, v):
            if ROUTE == "softmax":
                return softmax_attention(q, k, v)
            qkv = torch.stack((q, k, v), 2)
            return flash_attn_qkvpacked_func(qkv, dropout_p=0.0, deterministic=False, window_size=(-1, -1))
        """,
    # Bare, in part from submodules that are rarely used.
    "stripedhyena": """
        from flash_attn.modules.mha import MHA
        from flash_attn.layers.rotary import RotaryEmbedding
        from flash_attn import flash_attn_func

        ROUTE = "flash"

        def attend(q, k, v):
            return flash_attn_func(q, k, v)
        """,
}

#: Those whose imports transformers takes for bare.
REFUSED_WITHOUT_FLASH_ATTN = ("in a function", "stripedhyena")


def write(directory, pattern, supports=True):
    """Write the model of that pattern to `directory`: configuration, code and weights."""
    directory.mkdir()
    code = _IMPORTS + textwrap.dedent(PATTERNS[pattern]) + _SOFTMAX + _MODEL.format(supports=supports)
    (directory / "modeling_tiny.py").write_text(code)
    auto_map = {"AutoConfig": "modeling_tiny.TinyConfig", "AutoModel": "modeling_tiny.TinyModel"}
    config = {"model_type": "tiny-remote", "architectures": ["TinyModel"], "auto_map": auto_map, "width": 16}
    (directory / "config.json").write_text(json.dumps(config))
    weights = torch.randn(48, 16, generator=torch.Generator().manual_seed(0)) / 4
    tensors = {"qkv.weight": weights, "qkv.bias": weights[:, 0].clone()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory
