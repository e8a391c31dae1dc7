"""A sample of what `python -m tests.transformers.architectures` does with every model class of transformers."""

import pytest
import transformers

from tests.transformers.architectures.explained import TOLERANCE, explanation
from tests.transformers.architectures.run import Worker

MAJOR = int(transformers.__version__.partition(".")[0])

#: "package:Class", all cases of `architectures.compare`: grouped heads, windows, soft-capping, latent attention,
#: experts, sinks, sections of RoPE, an encoder and a decoder, images, audio, a classifier that reads the last token.
SAMPLE = [
    "llama:LlamaForCausalLM",
    "mistral:MistralForCausalLM",
    "gemma2:Gemma2ForCausalLM",
    "gemma3:Gemma3ForConditionalGeneration",
    "mixtral:MixtralForCausalLM",
    "deepseek_v3:DeepseekV3ForCausalLM",
    "qwen2_vl:Qwen2VLForConditionalGeneration",
    "bart:BartForConditionalGeneration",
    "whisper:WhisperForConditionalGeneration",
    "siglip:SiglipVisionModel",
    "wav2vec2:Wav2Vec2Model",
    "gemma:GemmaForSequenceClassification",
    "gpt_oss:GptOssForCausalLM" if MAJOR < 5 else "gpt2:GPT2LMHeadModel",
]

#: "package:Class", what it takes in place of "flash_attention_2".
OTHERWISE = [
    (
        "musicgen:MusicgenForConditionalGeneration",
        {
            "": "flash_attention_2",
            "text_encoder": "eager",
            "audio_encoder": "eager",
            "decoder": "flash_attention_2",
        },
    ),
    *([("gpt_oss:GptOssForCausalLM", "mps_fa")] if MAJOR >= 5 else []),
]


@pytest.fixture(scope="module")
def worker():
    worker = Worker()
    yield worker
    worker.stop()


@pytest.mark.parametrize("name", SAMPLE)
def test_equals_eager(worker, name):
    package, _, cls = name.partition(":")
    report = worker.examine(f"transformers.models.{package}.modeling_{package}:{cls}")
    assert "error" not in report, report
    assert {"forward", "gradients"} <= set(report["cases"])
    differences = {case: result.get("difference", result) for case, result in report["cases"].items()}
    for case, difference in differences.items():
        if case.startswith("with image") and name.startswith("gemma3:"):
            continue  # by the library's own code: see below
        assert isinstance(difference, float) or "not run" in difference, (case, difference)
        assert not isinstance(difference, float) or difference <= TOLERANCE, (case, differences)
    assert report["calls"] > 0
    assert report["noticed"] > 100 * TOLERANCE  # with scores that are wrong on purpose
    if cls.endswith("ForCausalLM"):
        assert {"decode", "generate dynamic", "generate static", "packed", "padded left"} <= set(differences)


@pytest.mark.parametrize(("name", "implementation"), OTHERWISE)
def test_equals_eager_where_a_part_or_the_model_refuses_flash_attention_2(worker, name, implementation):
    package, _, cls = name.partition(":")
    report = worker.examine(f"transformers.models.{package}.modeling_{package}:{cls}")
    assert (report["status"], report["implementation"]) == ("equal", implementation), report
    assert report["calls"] > 0
    assert report["noticed"] > 100 * TOLERANCE


#: "package:Class" and what its prompt can have: tiles, learned queries, grids of patches, an encoder's, sounds.
WITH = {
    "llava:LlavaForConditionalGeneration": {"image"},
    "llava_next:LlavaNextForConditionalGeneration": {"image"},
    "idefics2:Idefics2ForConditionalGeneration": {"image"},
    "qwen2_vl:Qwen2VLForConditionalGeneration": {"image", "video"},
    "voxtral:VoxtralForConditionalGeneration": {"audio"},
}


@pytest.mark.parametrize("name", WITH)
def test_equals_eager_with_images_and_sounds(worker, name):
    package, _, cls = name.partition(":")
    report = worker.examine(f"transformers.models.{package}.modeling_{package}:{cls}")
    for modality in WITH[name]:
        for case in (f"with {modality}", f"with {modality} generate", f"with {modality} gradients"):
            assert report["cases"][case].get("difference", 1.0) <= TOLERANCE, (case, report["cases"][case])
        assert report["cases"][f"with {modality}"]["tower"] > 100 * TOLERANCE  # with scores wrong in that part alone


def test_what_the_library_masks_among_the_tokens_of_an_image_is_seen(worker):
    report = worker.examine("transformers.models.gemma3.modeling_gemma3:Gemma3ForConditionalGeneration")
    assert report["cases"]["forward"]["difference"] <= TOLERANCE
    assert report["cases"]["with image"]["difference"] > 100 * TOLERANCE
    assert "tokens of an image attend to each other" in explanation(report)


def test_windows_and_softcaps_reach_the_kernels(worker):
    report = worker.examine("transformers.models.gemma2.modeling_gemma2:Gemma2ForCausalLM")
    masks = set("+".join(report["windows"]).split("+"))
    assert {"softcap", "causal", "varlen", "gradients"} <= masks
    assert any(mask.startswith("window(") for mask in masks)


def test_a_process_that_dies_is_replaced(worker):
    worker.stop()
    worker.start()
    worker.process.kill()
    worker.process.wait()
    assert worker.examine("transformers.models.llama.modeling_llama:LlamaModel")["status"] == "died"
    assert worker.examine("transformers.models.llama.modeling_llama:LlamaModel")["status"] == "equal"
