"""sentence-transformers and xformers: what can use flash attention does, and nothing crashes."""


def test_sentence_transformers(hooked, tmp_path):
    program = f"""
import torch
from sentence_transformers import SentenceTransformer
from transformers import BertConfig, BertModel, BertTokenizerFast
from flash_attn_mps import trace
directory = {str(tmp_path)!r}
letters = "abcdefghijklmnopqrstuvwxyz"
with open(directory + "/vocab.txt", "w") as vocabulary:
    vocabulary.write("\\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + c for c in letters)]))
torch.manual_seed(0)
sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
BertModel(BertConfig(vocab_size=57, max_position_embeddings=64, **sizes)).save_pretrained(directory)
BertTokenizerFast(vocab_file=directory + "/vocab.txt").save_pretrained(directory)
trace.enable()
found = []
for attention in ("eager", "flash_attention_2"):
    model = SentenceTransformer(directory, device="cpu", model_kwargs={{"attn_implementation": attention}})
    found.append(model.encode(["abc def", "hello world again and again", "x"], convert_to_tensor=True))
    assert (sum(trace.calls.values()) > 0) == (attention == "flash_attention_2")
assert torch.allclose(*found, atol=1e-5)
"""
    assert hooked.run(program, MTLFLASHATTN_SHIM="on") == ""


def test_xformers(hooked):
    """It finds flash_attn in its window of versions, and refuses tensors that are not on CUDA, as without."""
    program = """
import torch, xformers.ops
from xformers.ops.fmha import flash, flash3
print(flash.FLASH_VERSION, flash3.FLASH_VERSION)
q = torch.randn(1, 8, 2, 16)
try:
    xformers.ops.memory_efficient_attention(q, q, q)
except NotImplementedError as error:
    print("device=cpu (supported: {'cuda'})" in str(error))
"""
    done = hooked.start("-c", program, MTLFLASHATTN_SHIM="on")
    assert (done.returncode, done.stdout.split()) == (0, ["2.8.3", "0.0.0", "True"]), done.stderr
