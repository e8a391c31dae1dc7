"""Why FlashAttention 2 gives something else than eager attention, or fails: the library's own code, on any device."""

import re
from typing import NamedTuple

TOLERANCE = 1e-4  # of the largest value: above, it is a difference

_PADDING = "padded|gradients"
_ALL = "forward|padded|gradients"


class Reason(NamedTuple):
    """What it holds for: a major version ("" is any), patterns of "package:Class", of a case and of its error."""

    version: str
    classes: str
    cases: str
    text: str
    error: str = "^$"

    def holds(self, version, name, case, result):
        return (
            self.version in ("", version.partition(".")[0])
            and re.fullmatch(self.classes, name)
            and re.match(self.cases, case)
            and re.search(self.error, result.get("error", ""))
        )


# With 4.57.6 and 5.23.0; the numbers are lines there.
REASONS = [
    Reason("5", "aimv2:Aimv2TextModel", _PADDING, "hands is_causal=False with a causal mask (modeling_aimv2.py:314)"),
    Reason("4", "aimv2:Aimv2TextModel", _PADDING, "hands is_causal=False with a causal mask (modeling_aimv2.py:283)"),
    Reason(
        "5",
        "videoprism:VideoPrism(Text|Clip)Model",
        _PADDING,
        "is_causal is False with a causal mask (modeling_videoprism.py:365)",
    ),
    Reason("5", "moonshine:MoonshineDecoder", _PADDING, "is causal only without a mask (modeling_moonshine.py:327)"),
    Reason("4", "moonshine:MoonshineDecoder", _PADDING, "is causal only without a mask (modeling_moonshine.py:271)"),
    Reason("4", "gpt2:GPT2.*", f"{_PADDING}|decode|generate", "is causal only without a mask (modeling_gpt2.py:333)"),
    Reason("5", "pegasus_x:PegasusX.*", _ALL, "is_causal is False in the decoder too (modeling_pegasus_x.py:164)"),
    Reason("4", "pegasus_x:PegasusX.*", _ALL, "is_causal is False in the decoder too (modeling_pegasus_x.py:177)"),
    Reason(
        "5",
        "phi4_multimodal:Phi4MultimodalVisionModel",
        "forward|gradients",
        "is_causal is True in the image encoder, which sdpa follows too (modeling_phi4_multimodal.py:97)",
    ),
    Reason(
        "4",
        "phi4_multimodal:Phi4MultimodalVisionModel",
        "forward|gradients",
        "is_causal is True in the image encoder, which sdpa follows too (modeling_phi4_multimodal.py:100)",
    ),
    Reason(
        "5",
        "(paligemma|colpali):.*",
        f"{_ALL}|decode|packed",
        "without token_type_ids the mask is causal (modeling_paligemma.py:256), while is_causal is False "
        "(configuration_paligemma.py:93, modeling_gemma.py:228); sdpa without padding does the same",
    ),
    Reason(
        "4",
        "(paligemma|colpali):.*",
        f"{_ALL}|decode",
        "the prompt attends to all of itself in eager attention's mask alone (modeling_paligemma.py:171, 207), while "
        "is_causal is True (modeling_gemma.py:201)",
    ),
    Reason(
        "5",
        "t5gemma:T5Gemma.*",
        _ALL,
        "the encoder's window is one token smaller each way (modeling_flash_attention_utils.py:692) than the mask's "
        "(masking_utils.py:145)",
    ),
    Reason(
        "4",
        "siglip2?:Siglip2?TextModel",
        _PADDING,
        "drops the mask of padding for FlashAttention (modeling_siglip.py:599, modeling_siglip2.py:679)",
    ),
    Reason(
        "4",
        "modernbert:ModernBert.*",
        _ALL,
        "converts to bfloat16 for FlashAttention (modeling_modernbert.py:361): rounding of bfloat16",
    ),
    Reason(
        "4",
        "(qwen2_moe:Qwen2Moe|phimoe:Phimoe).*",
        "padded right|gradients|generate static",
        "refuses padding on the right, and takes a mask over a static cache for it (modeling_qwen2_moe.py:901, "
        "modeling_phimoe.py:1051)",
        error="padding_side='right'",
    ),
    Reason(
        "4",
        "qwen2_moe:Qwen2Moe.*",
        "forward|padded left|generate static",
        "gives FlashAttention a window from layer max_window_layers on (modeling_qwen2_moe.py:460), and the mask of "
        "eager attention in all layers (1019)",
    ),
    Reason(
        "4",
        "qwen2_moe:Qwen2MoeForCausalLM|phimoe:PhimoeForCausalLM",
        "decode|generate dynamic",
        "hands FlashAttention the mask of all tokens over a cache of a window (modeling_qwen2_moe.py:909, "
        "modeling_phimoe.py:1058)",
        error="out of bounds",
    ),
    Reason(
        "4",
        "gpt_neo:GPTNeo.*",
        f"{_PADDING}|decode|generate dynamic",
        "takes the mask of FlashAttention for one of four dimensions (modeling_gpt_neo.py:314)",
        error="too many indices",
    ),
    Reason(
        "4",
        "bark:Bark(Causal|Semantic|Coarse)Model",
        "decode|generate dynamic",
        "its cache joins heads in place of tokens under FlashAttention (modeling_bark.py:235)",
        error="Expected size",
    ),
    Reason(
        "5",
        "moonshine_streaming:MoonshineStreamingDecoder",
        _PADDING,
        "is causal only without a mask (modeling_moonshine_streaming.py:659)",
    ),
    Reason(
        "5",
        "diffusion_gemma:DiffusionGemma.*",
        f"{_ALL}|generate",
        "the decoder attends to the whole prompt (modeling_diffusion_gemma.py:1381), but gives FlashAttention the "
        "window of the encoder (452)",
    ),
    Reason(
        "5",
        "pi0:PI0.*",
        "forward|gradients",
        "its mask of blocks (modeling_pi0.py:199) is no mask of FlashAttention, which attends causally",
    ),
    Reason(
        "5",
        "lightglue:LightGlueForKeypointMatching",
        "forward|gradients",
        "is_causal is True in its bidirectional attention (modeling_lightglue.py:184)",
    ),
    Reason(
        "5",
        "mobilebert:MobileBertModel",
        "padded left",
        "the pooler reads the first token (modeling_mobilebert.py:467), which is padding here, and is saturated",
    ),
    Reason(
        "4",
        "moshi:Moshi(Model|ForCausalLM|ForConditionalGeneration)",
        f"{_ALL}|decode|generate",
        "the mask of eager attention has a window (modeling_moshi.py:1170), which FlashAttention is not given (606)",
    ),
    Reason(
        "4",
        "moshi:Moshi(Model|ForCausalLM|ForConditionalGeneration)",
        "decode|generate dynamic",
        "hands FlashAttention the mask of all tokens over a cache of a window (modeling_moshi.py:1080)",
        error="out of bounds",
    ),
    Reason(
        "4",
        "kyutai_speech_to_text:KyutaiSpeechToText.*",
        f"{_ALL}|decode|generate",
        "the mask of eager attention has a window (modeling_kyutai_speech_to_text.py:1040), which FlashAttention is "
        "not given (606)",
    ),
    Reason(
        "4",
        "evolla:EvollaSaProtProteinEncoder",
        ".*",
        "hands FlashAttention a mask of four dimensions (modeling_evolla.py:627)",
        error="accepted: a tensor .batch",
    ),
    Reason(
        "4",
        "lightglue:LightGlueForKeypointMatching",
        ".*",
        "hands FlashAttention a mask of four dimensions (modeling_lightglue.py:750)",
        error="accepted: a tensor .batch",
    ),
    Reason(
        "4",
        "kosmos2:Kosmos2.*",
        ".*",
        "its attention does not say whether it is causal (modeling_kosmos2.py:659), which FlashAttention is asked by "
        "(integrations/flash_attention.py:64)",
        error="no attribute 'is_causal'",
    ),
    Reason(
        "4",
        "mllama:Mllama.*",
        ".*",
        "its attention does not say whether it is causal (modeling_mllama.py:219, 510), which FlashAttention is asked "
        "by (integrations/flash_attention.py:64)",
        error="no attribute 'is_causal'",
    ),
    Reason(
        "4",
        "pixtral:PixtralVisionModel",
        ".*",
        "hands on positions without a batch (modeling_pixtral.py:493), and FlashAttention looks for their second axis "
        "(modeling_flash_attention_utils.py:409)",
        error="tuple index out of range",
    ),
    Reason(
        "5",
        "phi4_multimodal:Phi4MultimodalAudioModel",
        ".*",
        "hands FlashAttention a bias of relative positions for a mask (modeling_phi4_multimodal.py:1030)",
        error="out of bounds|Autograd not support",
    ),
    Reason(
        "4",
        "phi4_multimodal:Phi4MultimodalAudioModel",
        ".*",
        "hands FlashAttention a bias of relative positions for a mask (modeling_phi4_multimodal.py:1115)",
        error="out of bounds|Autograd not support",
    ),
    Reason(
        "4",
        "mimi:MimiModel",
        "forward|gradients",
        "gives a window to FlashAttention alone (modeling_mimi.py:810, 1101)",
    ),
    Reason(
        "4",
        "qwen3_omni_moe:Qwen3OmniMoeTalkerCodePredictorModelForConditionalGeneration",
        "generate static",
        "without padding FlashAttention gets no mask, and attends to what is not yet filled of a static cache "
        "(masking_utils.py:558)",
    ),
    Reason(
        "4",
        ".*",
        "generate static",
        "generate hands a mask of four dimensions over the static cache to FlashAttention",
        error=r"out of bounds for dimension 0 with size \d+ \(transformers/modeling_flash",
    ),
    Reason(
        "4",
        ".*",
        "generate static",
        "transformers refuses a static cache with FlashAttention 2",
        error="`static` cache implementation is not compatible",
    ),
    Reason(
        "5",
        "moshi:MoshiForCausalLM",
        "generate static",
        "generate makes a mask with a window for eager attention and sdpa (masking_utils.py:1621), which the model "
        "itself does not have (modeling_moshi.py:482)",
    ),
    Reason(
        "5",
        "(glm4v_moe:Glm4vMoe|ernie4_5_vl_moe:Ernie4_5_VL_?Moe)ForConditionalGeneration",
        "packed",
        "hands the positions of three axes to FlashAttention as if of one sequence (modeling_glm4v_moe.py:1008, "
        "modeling_ernie4_5_vl_moe.py:785)",
        error="accepted: 17, the number of rows of q",
    ),
    Reason(
        "5",
        "qwen3_omni_moe:Qwen3OmniMoeThinkerForConditionalGeneration",
        "generate static",
        "generate makes a mask with a window for eager attention and sdpa (masking_utils.py:1621), which the model "
        "itself does not have (modeling_qwen3_omni_moe.py:1696)",
    ),
    Reason(
        "4",
        "qwen3_omni_moe:Qwen3OmniMoeThinkerForConditionalGeneration",
        "with audio",
        "gives cu_seqlens to FlashAttention (modeling_qwen3_omni_moe.py:542), and eager attention no mask that keeps "
        "sounds apart: what would make it (682) is not called",
    ),
    Reason(
        "5",
        "gemma3:Gemma3.*|shieldgemma2:ShieldGemma2ForImageClassification",
        "with image",
        "tokens of an image attend to each other in eager attention's mask (modeling_gemma3.py:889), of which "
        "FlashAttention gets the padding alone (masking_utils.py:667)",
    ),
    Reason(
        "4",
        "gemma3:Gemma3.*",
        "with image",
        "tokens of an image attend to each other in eager attention's mask (modeling_gemma3.py:947), of which "
        "FlashAttention gets the padding alone (masking_utils.py:553)",
    ),
    Reason(
        "5",
        "gemma4_unified:Gemma4Unified.*",
        "with (image|video)",
        "tokens of an image attend to each other in eager attention's mask (modeling_gemma4_unified.py:1177), "
        "of which FlashAttention gets the padding alone (masking_utils.py:667)",
    ),
    Reason(
        "5",
        "molmo2:Molmo2.*",
        "with image",
        "tokens of images attend to each other in eager attention's mask (modeling_molmo2.py:875), of which "
        "FlashAttention gets the padding alone (masking_utils.py:667)",
    ),
    Reason(
        "5",
        "colpali:ColPaliForRetrieval",
        "with image",
        "gives no token_type_ids (modeling_colpali.py:117): then the mask is causal (modeling_paligemma.py:256), while "
        "is_causal is False (configuration_paligemma.py:93, modeling_gemma.py:228)",
    ),
    Reason(
        "4",
        "(paligemma|colpali):.*",
        "with image",
        "the prompt attends to all of itself in eager attention's mask alone (modeling_paligemma.py:171, 207), while "
        "is_causal is True (modeling_gemma.py:201)",
    ),
    Reason(
        "5",
        "phi4_multimodal:Phi4Multimodal(Model|ForCausalLM)",
        "with image",
        "is_causal is True in the image encoder, which sdpa follows too (modeling_phi4_multimodal.py:97)",
    ),
    Reason(
        "5",
        "phi4_multimodal:Phi4Multimodal(Model|ForCausalLM)",
        "with audio",
        "the audio encoder hands FlashAttention a mask of four dimensions (modeling_phi4_multimodal.py:1030)",
        error="out of bounds|Autograd not support dtype: Int",
    ),
    Reason(
        "4",
        "phi4_multimodal:Phi4Multimodal(Model|ForCausalLM)",
        "with image",
        "is_causal is True in the image encoder, which sdpa follows too (modeling_phi4_multimodal.py:100)",
    ),
    Reason(
        "4",
        "phi4_multimodal:Phi4Multimodal(Model|ForCausalLM)",
        "with audio",
        "the audio encoder hands FlashAttention a mask of four dimensions (modeling_phi4_multimodal.py:1115)",
        error="out of bounds|Autograd not support dtype: Int",
    ),
    Reason(
        "4",
        "qwen2_audio:Qwen2AudioForConditionalGeneration",
        "with audio",
        "hands FlashAttention a mask of four dimensions in the audio encoder (modeling_qwen2_audio.py:801)",
        error=r"cu_seqlens_q: got a tensor \(2, 1, 65\)",
    ),
    Reason(
        "4",
        "mistral3:Mistral3.*",
        "with image",
        "the image encoder hands FlashAttention positions of one dimension (modeling_pixtral.py:493), where two are "
        "read (modeling_flash_attention_utils.py:409)",
        error="tuple index out of range",
    ),
    Reason(
        "5",
        "minicpm_ocr:MiniCPMOcr(Model|ForConditionalGeneration)",
        "with image gradients",
        "rounding, which the norm after linear attention makes larger (modeling_qwen3_5.py:215): eager attention's "
        "gradients move as far when the image moves by 1e-7",
    ),
]


class Broken(NamedTuple):
    """What cannot be built, or not run with eager attention, whatever it is given."""

    version: str
    classes: str
    text: str


BROKEN = [
    Broken(
        "",
        "qwen3_omni_moe:Qwen3OmniMoeCode2WavDecoderBlock",
        "a part made of convolutions, which is built from the number of its layer besides a configuration",
    ),
    Broken(
        "5",
        "gemma4_assistant:Gemma4AssistantForCausalLM|gemma4_unified_assistant:Gemma4UnifiedAssistantForCausalLM",
        "all its layers must share keys (configuration_gemma4_assistant.py:93), which the text model that it builds "
        "refuses (configuration_gemma4.py:240, configuration_gemma4_unified.py:208)",
    ),
    Broken(
        "5",
        "qwen2_5_omni:Qwen2_5OmniToken2WavDiTModel",
        "has no eager attention, and asks for it by name (modeling_qwen2_5_omni.py:2993); the model that holds it "
        "gives it sdpa in place of FlashAttention 2 (3658)",
    ),
    Broken(
        "4",
        "qwen2_5_omni:Qwen2_5OmniToken2WavDiTModel",
        "has no eager attention, and asks for it by name (modeling_qwen2_5_omni.py:3000); the model that holds it "
        "gives it sdpa in place of FlashAttention 2 (3644)",
    ),
]


def brokenness(report):
    """Why the library's own code cannot build or run a class; None if that is not so, or not known."""
    if report["status"] not in ("configure", "build", "eager"):
        return None
    name = _name(report)
    return next(
        (
            broken.text
            for broken in BROKEN
            if broken.version in ("", report["version"].partition(".")[0]) and re.fullmatch(broken.classes, name)
        ),
        None,
    )


def is_wrong(result):
    return "error" in result or result.get("difference", 0) > TOLERANCE


def _name(report):
    return f"{report['name'].split('.')[2]}:{report['name'].rpartition(':')[2]}"


def explanation(report):
    """Why the library's own code makes every difference of a report, in words; None if one of them is not known."""
    if report["status"] not in ("differs", "error"):
        return None
    name = _name(report)
    texts = {}
    for case, result in report["cases"].items():
        if not is_wrong(result):
            continue
        text = _text(report["version"], name, case, result)
        if text is None:
            return None
        texts.setdefault(text, []).append(case)
    return "; ".join(f"{', '.join(cases)}: {text}" for text, cases in texts.items())


def _text(version, name, case, result):
    for reason in REASONS:
        if reason.holds(version, name, case, result):
            return reason.text
    if case == "packed" and "error" not in result and not any("varlen" in mask for mask in result.get("masks", [""])):
        return "its attention does not hand position_ids to FlashAttention"
    return None
