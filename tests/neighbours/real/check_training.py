"""peft, accelerate and trl: a training step with flash_attention_2 equals one with eager."""

from ..conftest import QUIET

SMALL = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from flash_attn_mps import trace

def make(attention):
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=32)
    return LlamaForCausalLM._from_config(LlamaConfig(**sizes), attn_implementation=attention)

def called():
    count = sum(trace.calls.values())
    trace.calls.clear()
    return count

def batch():
    ids = torch.arange(24).reshape(2, 12)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    # The first token after the padding is predicted by a padded position, where attentions may differ.
    labels = ids.masked_fill(mask == 0, -100).index_fill(1, torch.tensor([5]), -100)
    return dict(input_ids=ids, attention_mask=mask, labels=labels)

trace.enable()
"""


def test_peft_lora(hooked):
    program = f"""
{SMALL}
from peft import LoraConfig, get_peft_model
steps = []
for attention in ("eager", "flash_attention_2"):
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(make(attention), lora)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
    assert called() == (0 if attention == "eager" else 4)
    steps.append([loss.detach(), *(parameter.grad for parameter in trained)])
for eager, flash in zip(*steps, strict=True):
    assert torch.allclose(eager, flash, rtol=1e-4, atol=1e-5)
"""
    assert hooked.run(program, MTLFLASHATTN_SHIM="on") == ""


def test_accelerate(hooked):
    program = f"""
{SMALL}
from accelerate import Accelerator
losses = []
for attention in ("eager", "flash_attention_2"):
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(make(attention), None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(**batch()).loss
        accelerator.backward(loss)
        optimizer.step()
    assert called() == (0 if attention == "eager" else 4)
    losses.append(loss.item())
assert abs(losses[0] - losses[1]) < 1e-5, losses
"""
    assert hooked.run(program, MTLFLASHATTN_SHIM="on") == ""


def test_trl_sft(hooked, tmp_path):
    """One step: padded, packed, and padding-free, which trl offers with flash attention only."""
    program = f"""
{SMALL}
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer
letters = {{name: number for number, name in enumerate(["<pad>", "<eos>", *"abcdefghijklmnopqrstuvwxyz "])}}
words = Tokenizer(models.WordLevel(letters, unk_token="a"))
words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
texts = Dataset.from_dict({{"text": ["abc def", "hello world again", "x y z", "the quick brown fox"]}})
ways = dict(padded={{}}, packed=dict(packing=True, max_length=32), free=dict(padding_free=True, max_length=None))
losses = {{}}
for name, way in ways.items():
    for attention in ("eager", "flash_attention_2") if name == "padded" else ("flash_attention_2",):
        options = SFTConfig(output_dir={str(tmp_path)!r}, max_steps=1, per_device_train_batch_size=4, report_to="none",
                            use_cpu=True, bf16=False, gradient_checkpointing=False, save_strategy="no",
                            disable_tqdm=True, logging_steps=100, **way)
        trainer = SFTTrainer(model=make(attention), args=options, train_dataset=texts, processing_class=tokenizer)
        losses[name, attention] = trainer.train().training_loss
        assert called() == (0 if attention == "eager" else 2), name
assert max(losses.values()) - min(losses.values()) < 1e-5, losses
print(len(losses))
"""
    variables = {"MTLFLASHATTN_SHIM": "on", "HF_HOME": tmp_path, "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    assert hooked.interpreter.start("-c", program, **{**QUIET, **variables}).stdout.splitlines()[-1] == "4"
