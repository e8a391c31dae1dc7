"""A model of transformers with flash_attention_2 under torch.compile: one graph for all lengths, the same numbers."""

PROGRAM = """
import flash_attn_shim
flash_attn_shim.install()
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import LlamaConfig, LlamaForCausalLM

torch.set_num_threads(1)
sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, vocab_size=64)
config = LlamaConfig(num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3, **sizes)
model = LlamaForCausalLM._from_config(config, attn_implementation="flash_attention_2")
eager = LlamaForCausalLM._from_config(config, attn_implementation="eager")
eager.load_state_dict(model.state_dict())

def plain(n):
    return torch.randint(1, 64, (2, n)), {}

def padded(n):
    mask = torch.ones(2, n, dtype=torch.long)
    mask[0, :2] = 0
    return torch.randint(1, 64, (2, n)), {"attention_mask": mask}

def packed(n):  # two sequences in a row, told apart by their positions
    return torch.randint(1, 64, (1, 2 * n)), {"position_ids": torch.arange(n).repeat(2)[None]}

for make, train in ((plain, False), (padded, True), (packed, False)):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for n in LENGTHS:
        ids, how = make(n)
        valid = how.get("attention_mask", torch.ones_like(ids)).bool()
        with torch.set_grad_enabled(train):
            results = [m(ids, use_cache=False, **how).logits[valid] for m in (compiled, model)]
            if make is not packed:
                results.append(eager(ids, use_cache=False, **how).logits[valid])
            else:  # eager attention does not look at positions
                results.append(eager(ids.view(2, n), use_cache=False).logits.view_as(results[0]))
        for other in results[1:]:
            torch.testing.assert_close(results[0], other, rtol=1e-3, atol=1e-3)
        if train:
            grads = [torch.autograd.grad(logits.square().mean(), m.parameters())
                     for logits, m in zip(results, (model, model, eager))]
            for mine, right in zip(grads[0] * 2, grads[1] + grads[2]):
                torch.testing.assert_close(mine, right, rtol=1e-3, atol=1e-3)
    print(make.__name__, train, counter.frame_count)
"""


def test_one_graph_for_all_lengths(run):
    """`use_cache` aside, which transformers itself keeps out of graphs of growing length."""
    printed = run(PROGRAM.replace("LENGTHS", "(5, 9, 23)"), MTLFLASHATTN_SHIM="on")
    cases = [line.split() for line in printed.splitlines()]
    assert cases == [["plain", "False", "2"], ["padded", "True", "2"], ["packed", "False", "2"]]
