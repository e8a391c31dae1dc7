"""`attn_implementation="flash_attention_2"`: when it is there, and how a model gets to it."""

import pytest
import transformers

ON = {"MTLFLASHATTN_SHIM": "on"}

MAC = """
import os, flash_attn_shim.finder, flash_attn_shim.policy
flash_attn_shim.finder.environment = lambda: flash_attn_shim.policy.Environment(
    os.environ, "darwin", "arm64", flash_attn_shim.finder.is_installed)
flash_attn_shim.install()
"""

SMALL = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=16)
def make(**attention):
    return LlamaForCausalLM._from_config(LlamaConfig(**sizes), **attention)
ids = torch.arange(6).reshape(1, 6)
def logits(model):
    with torch.no_grad():
        return model(ids).logits
"""


def test_what_transformers_concludes(run):
    program = """
    import flash_attn_shim
    flash_attn_shim.install()
    from transformers import utils
    from transformers.utils import import_utils
    answers = {name: getattr(import_utils, name)() for name in dir(import_utils) if name.startswith("is_flash_attn_")
               and name[14:].startswith(("2_available", "3_available", "4_available"))}
    answers["2.3.3"], answers["2.9"] = (utils.is_flash_attn_greater_or_equal(v) for v in ("2.3.3", "2.9.0"))
    print(sorted(name for name, answer in answers.items() if answer))
    """
    assert run(program, **ON) == "['2.3.3', 'is_flash_attn_2_available']"
    assert run(program, MTLFLASHATTN_TRANSFORMERS="off", **ON) == "[]"
    assert run(program, MTLFLASHATTN_SHIM="off") == "[]"


def test_hidden_from_transformers_alone(run):
    """MTLFLASHATTN_TRANSFORMERS=off: flash_attn is there, and transformers concludes what it concludes without it."""
    program = f"""
import flash_attn_shim
flash_attn_shim.install()
{SMALL}
from transformers import ModernBertConfig, ModernBertModel
from transformers.utils import import_utils
print(import_utils._is_package_available("flash_attn"))
for name in dir(import_utils):
    if name.startswith("is_flash_attn"):
        argument = {{"is_flash_attn_greater_or_equal": ["2.3.3"], "is_flash_attn_kernel_fallback_available": [2]}}
        print(name, getattr(import_utils, name)(*argument.get(name, [])))
try:
    make(attn_implementation="flash_attention_2")
except ImportError as error:
    print(type(error).__name__, "FlashAttention2 has been toggled on, but" in str(error))
tokens = dict(pad_token_id=0, bos_token_id=1, cls_token_id=1, eos_token_id=2, sep_token_id=2)
print(make().config._attn_implementation)
print(ModernBertModel(ModernBertConfig(**sizes, **tokens, reference_compile=False)).config._attn_implementation)
try:
    import flash_attn
    print(flash_attn_shim.finder.is_ours(flash_attn))
except ModuleNotFoundError:
    print("no flash_attn")
"""
    *hidden, there = run(program, MTLFLASHATTN_TRANSFORMERS="off", **ON).splitlines()
    *absent, nothing = run(program, MTLFLASHATTN_SHIM="off").splitlines()
    assert (there, nothing) == ("True", "no flash_attn")
    assert hidden == absent
    assert {"is_flash_attn_2_available False", "is_flash_attn_greater_or_equal False", "ImportError True"} < set(hidden)


def test_importing_transformers_imports_no_flash_attn(run):
    """4.57's integrations/flash_paged.py takes flash_attn_varlen_func as soon as modeling_utils is imported."""
    program = """
    import sys, flash_attn_shim
    flash_attn_shim.install()
    import transformers, transformers.utils
    transformers.utils.is_flash_attn_2_available()
    if transformers.__version__ >= "5":
        import transformers.modeling_utils
    print(sorted(name for name in sys.modules if name.split(".")[0] in ("flash_attn", "flash_attn_interface")))
    """
    assert run(program, **ON) == "[]"


@pytest.mark.parametrize("when", ["before", "after", "after, asked already"])
def test_load_and_switch(run, tmp_path, when):
    """At load time, and by set_attn_implementation on a model on the CPU; transformers imported before or after."""
    late = f"""
from transformers.utils import is_flash_attn_2_available as asked, is_flash_attn_greater_or_equal as version_asked
import transformers.models.llama.modeling_llama
if {when == "after, asked already"}:
    assert not asked() and not version_asked("2.3.3")
"""
    program = f"""
{late if when != "before" else ""}
import flash_attn_shim
flash_attn_shim.install()
{SMALL}
from transformers.utils import is_flash_attn_2_available, is_flash_attn_greater_or_equal
assert is_flash_attn_2_available() and is_flash_attn_greater_or_equal("2.3.3")
eager = make(attn_implementation="eager").eval()
eager.save_pretrained({str(tmp_path)!r})
loaded = LlamaForCausalLM.from_pretrained({str(tmp_path)!r}, attn_implementation="flash_attention_2").eval()
switched = LlamaForCausalLM.from_pretrained({str(tmp_path)!r}, attn_implementation="eager").eval()
switched.set_attn_implementation("flash_attention_2")
from flash_attn_mps import trace
trace.enable()
for model in (loaded, switched):
    assert model.config._attn_implementation == "flash_attention_2"
    assert (logits(model) - logits(eager)).abs().max() < 1e-5
print(sum(trace.calls.values()))
"""
    if when == "before":
        assert run(program, **ON) == "2"
    else:  # the hook of the interpreter's own start is there already: switched off until then
        late_switch = "import os; os.environ['MTLFLASHATTN_SHIM'] = 'on'\nimport flash_attn_shim\n"
        program = program.replace("import flash_attn_shim\n", late_switch, 1)
        assert run(program, MTLFLASHATTN_SHIM="off") == "2"


def test_gradients(run):
    program = f"""
import flash_attn_shim
flash_attn_shim.install()
{SMALL}
gradients = []
for attention in ("eager", "flash_attention_2"):
    torch.manual_seed(0)
    model = make(attn_implementation=attention).train()
    model(ids, labels=ids).loss.backward()
    gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
print(((gradients[0] - gradients[1]).abs().max() / gradients[0].abs().max()).item() < 1e-5)
"""
    assert run(program, **ON) == "True"


def test_switched_off_afterwards(run):
    program = f"""
import os, flash_attn_shim
flash_attn_shim.install()
{SMALL}
model = make(attn_implementation="flash_attention_2")
before = logits(model)
os.environ["MTLFLASHATTN_SHIM"] = "off"
assert torch.equal(logits(model), before)  # what is loaded goes on
try:
    make(attn_implementation="flash_attention_2")
except ImportError:
    pass
else:
    raise AssertionError
make()
os.environ["MTLFLASHATTN_SHIM"] = "on"
assert torch.isfinite(logits(make(attn_implementation="flash_attention_2"))).all()
flash_attn_shim.uninstall()
from transformers.utils import is_flash_attn_2_available
print(is_flash_attn_2_available())
"""
    assert run(program, **ON) == "False"


@pytest.mark.parametrize("attention", ["flash_attention_3", "flash_attention_4"])
def test_later_flash_attentions_are_refused(run, attention):
    program = f"""
import flash_attn_shim
flash_attn_shim.install()
{SMALL}
try:
    make(attn_implementation={attention!r})
except (ImportError, ValueError) as error:
    print(type(error).__name__)
"""
    assert run(program, **ON) in ("ImportError", "ValueError")


def test_a_mac_without_mps_says_so_and_keeps_its_defaults(run):
    """`auto` on a Mac whose torch has no MPS: found, announced, and not usable."""
    program = f"""
{MAC}
import torch
torch.backends.mps.is_available = lambda: False
{SMALL}
from transformers import ModernBertConfig, ModernBertModel
assert not flash_attn_shim.status().metadata
try:
    make(attn_implementation="flash_attention_2")
except ImportError as error:
    print("cannot be used" in str(error))
tokens = dict(pad_token_id=0, bos_token_id=1, cls_token_id=1, eos_token_id=2, sep_token_id=2)
model = ModernBertModel(ModernBertConfig(**sizes, **tokens, reference_compile=False))
print(model.config._attn_implementation, torch.isfinite(model(ids)[0]).all().item())
"""
    assert run(program).split() == ["True", "sdpa", "True"]


def test_a_mac_with_mps_may_use_it_before_the_model_is_moved(run):
    """`auto` on a Mac: a model that is still on the CPU may be switched. (What MPS itself computes needs a Mac.)"""
    program = f"""
{MAC}
import torch
torch.backends.mps.is_available = lambda: True
{SMALL}
model = make(attn_implementation="eager")
model.set_attn_implementation("flash_attention_2")
print(model.config._attn_implementation)
"""
    assert run(program) == "flash_attention_2"


def test_modernbert_imported_too_early_keeps_its_default(run):
    """4.57's ModernBERT decides at its import whether it has a rotary embedding for FlashAttention."""
    program = f"""
import os
import transformers.models.modernbert.modeling_modernbert
os.environ["MTLFLASHATTN_SHIM"] = "on"
import flash_attn_shim
flash_attn_shim.install()
{SMALL}
from transformers import ModernBertConfig, ModernBertModel
tokens = dict(pad_token_id=0, bos_token_id=1, cls_token_id=1, eos_token_id=2, sep_token_id=2)
model = ModernBertModel(ModernBertConfig(**sizes, **tokens, reference_compile=False))
print(torch.isfinite(model(ids)[0]).all().item())
"""
    assert run(program, MTLFLASHATTN_SHIM="off") == "True"


REMOTE = """
import torch
import flash_attn
from flash_attn import flash_attn_func
from flash_attn.bert_padding import pad_input, unpad_input
from transformers import PretrainedConfig, PreTrainedModel
"""


def test_remote_code_that_imports_flash_attn(run, tmp_path):
    """transformers#28459: the check of a repository's own code; and its users' remedy, which takes flash_attn out
    of it."""
    (tmp_path / "modeling_remote.py").write_text(REMOTE)
    program = f"""
    import flash_attn_shim
    flash_attn_shim.install()
    from unittest.mock import patch
    from transformers import dynamic_module_utils
    file = {str(tmp_path / "modeling_remote.py")!r}
    try:
        dynamic_module_utils.check_imports(file)
        print("passes")
    except ImportError as error:
        print("pip install flash_attn" in str(error))
    original = dynamic_module_utils.get_imports
    def fixed_get_imports(filename):
        return [name for name in original(filename) if name != "flash_attn"]
    with patch("transformers.dynamic_module_utils.get_imports", fixed_get_imports):
        dynamic_module_utils.check_imports(file)
    """
    assert run(program, **ON) == "passes"
    assert run(program, MTLFLASHATTN_SHIM="off") == "True"


def test_blocked_by_the_user(run):
    program = f"""
import sys
sys.modules["flash_attn"] = None
import flash_attn_shim
flash_attn_shim.install()
{SMALL}
from transformers.utils import is_flash_attn_2_available
print(is_flash_attn_2_available(), make().config._attn_implementation)
"""
    assert run(program, **ON) == "False sdpa"


def test_float32_without_linear_layers(run):
    """In float32 transformers asks a torch.nn.Linear in the attention for a dtype; GPT-2's projections are Conv1D."""
    program = """
    import flash_attn_shim
    flash_attn_shim.install()
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel
    from flash_attn_mps import trace
    trace.enable()
    ids = torch.arange(6).reshape(1, 6)
    found = []
    for attention in ("eager", "flash_attention_2"):
        torch.manual_seed(0)
        config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=16, initializer_range=0.3)
        model = GPT2LMHeadModel._from_config(config, attn_implementation=attention).eval()
        out = model(ids, labels=ids)
        out.loss.backward()
        found.append(torch.cat([out.logits.flatten(), *(p.grad.flatten() for p in model.parameters())]))
    difference = (found[0] - found[1]).abs().max() / found[0].abs().max()
    print(difference.item() < 1e-5, sum(trace.calls.values()))
    """
    assert run(program, **ON) == "True 1"


def test_one_row_of_positions_for_all_sequences(run):
    """4.54 packs whatever comes with position_ids, of which its models pass one row. It has the function that prepares
    them, as later versions have, and no `_is_packed_sequence`. (A model in 4.54 itself: versions.py.)"""
    program = """
    import os, torch
    from transformers import modeling_flash_attention_utils as utils
    q = torch.randn(2, 3, 1, 4)
    def prepared():
        *packed, (cu_seqlens_q, cu_seqlens_k), (longest, _) = utils._prepare_from_posids(q, q, q, torch.arange(3)[None])
        return cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), int(longest), [len(tensor) for tensor in packed]
    assert prepared() == ([0, 3], [0, 3], 3, [6, 6, 6])
    del utils._is_packed_sequence
    os.environ["MTLFLASHATTN_SHIM"] = "on"
    import flash_attn_shim
    flash_attn_shim.install()
    print(prepared())
    flash_attn_shim.uninstall()
    assert prepared()[0] == [0, 3]
    """
    assert run(program, MTLFLASHATTN_SHIM="off") == "([0, 3, 6], [0, 3, 6], 3, [6, 6, 6])"


def test_sinks_are_served_and_not_left_out(run):
    """Upstream's FlashAttention 2 has no argument for them, and 4.57 would leave them out; 5.x wants another kernel."""
    program = """
    import flash_attn_shim
    flash_attn_shim.install()
    import copy, torch
    from transformers import GptOssConfig, GptOssForCausalLM
    config = GptOssConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                          vocab_size=16, num_key_value_heads=1, head_dim=8, num_local_experts=2, num_experts_per_tok=1)
    logits = []
    try:
        for attention in ("eager", "flash_attention_2"):
            torch.manual_seed(0)
            model = GptOssForCausalLM._from_config(copy.deepcopy(config), attn_implementation=attention)
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.5)
            logits.append(model(torch.arange(6).reshape(1, 6)).logits)
    except ImportError as error:
        assert "kernels" in str(error)
        print("refused by transformers")
    else:
        difference = (logits[0] - logits[1]).abs().max() / logits[0].abs().max()
        print("served" if 0 < difference < 1e-5 else difference)
    """
    expected = "served" if int(transformers.__version__.partition(".")[0]) < 5 else "refused by transformers"
    assert run(program, **ON) == expected


def test_sinks_that_reach_the_function_pass(run):
    program = """
    import flash_attn_shim
    flash_attn_shim.install()
    import inspect, torch
    from transformers import modeling_flash_attention_utils as utils
    process = utils._process_flash_attention_kwargs
    assert "s_aux" in inspect.signature(process).parameters
    def taking(*names):
        def flash_attn_varlen_func(): pass
        parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names]
        flash_attn_varlen_func.__signature__ = inspect.Signature(parameters)
        return utils._lazy_define_process_function(flash_attn_varlen_func)
    call = dict(query_length=4, key_length=4, is_causal=True)
    assert "s_aux" in taking("s_aux")(**call, s_aux=torch.zeros(2))
    assert "s_aux" not in taking("causal")(**call, s_aux=None)
    try:
        taking("causal")(**call, s_aux=torch.zeros(2))
    except NotImplementedError:
        print("refused")
    """
    assert run(program, **ON) == "refused"
