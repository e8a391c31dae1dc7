"""Programs that call FlashAttention 3: `attend(q, k, v)` of (batch, seqlen, heads, head_dim), whatever the build."""

TAKE = "from flash_attn_interface import flash_attn_func\n"

#: Written for early builds, whose functions return (out, softmax_lse).
EARLY = {
    "indexed, beside FlashAttention 2": """
        try:
            try:
                from flash_attn_interface import flash_attn_func
                BACKEND = 3
            except ImportError:
                from flash_attn import flash_attn_func
                BACKEND = 2
        except ImportError:
            BACKEND = 0

        def attend(q, k, v):
            if BACKEND == 3:
                out = flash_attn_func(q, k, v, causal=False)[0]
            else:
                out = flash_attn_func(q, k, v, dropout_p=0.0)
            return out.flatten(-2).unflatten(-1, q.shape[-2:])
        """,
    "unpacked": TAKE
    + """
def attend(q, k, v):
    out, lse = flash_attn_func(q, k, v)
    assert lse.shape == (q.shape[0], q.shape[2], q.shape[1])
    return out
""",
    "unpacked without use": TAKE
    + """
def attend(q, k, v):
    hidden, second = flash_attn_func(q, k, v)
    return hidden
""",
    "unpacked with a star, imported in the function": """
        class Attention:
            def forward(self, q, k, v):
                from flash_attn_interface import flash_attn_func
                x, *_ = flash_attn_func(
                    q,
                    k,
                    v,
                    softmax_scale=q.shape[-1] ** -0.5,
                )
                return x

        attend = Attention().forward
        """,
    "walrus": TAKE
    + """
def attend(q, k, v):
    return (result := flash_attn_func(q, k, v))[0] + 0 * result[1].mean()
""",
    "walrus in a condition": TAKE
    + """
def attend(q, k, v):
    if (result := flash_attn_func(q, k, v)) is not None:
        out, lse = result
    return out
""",
    "decorated": TAKE
    + """
import functools

def logged(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        result = function(*args, **kwargs)
        print(end="")
        return result
    return wrapper

@logged
@logged
def flash(q, k, v):
    return flash_attn_func(q, k, v)

def attend(q, k, v):
    return flash(q, k, v)[0]
""",
    "nested": TAKE
    + """
def attend(q, k, v):
    def inner():
        def innermost():
            return flash_attn_func(q, k, v)
        return innermost()
    out, _ = inner()
    return out
""",
    "wrapped in a class": TAKE
    + """
import torch

class Backend:
    def __init__(self):
        self.function = flash_attn_func

    def __call__(self, *tensors):
        return self.function(*tensors)

class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.backend = Backend()

    @torch.no_grad()
    def forward(self, q, k, v):
        return self.backend(q, k, v)[0]

attend = Layer()
""",
    "stored in self": TAKE
    + """
class Layer:
    def run(self, q, k, v):
        self.result = flash_attn_func(q, k, v)

    def attend(self, q, k, v):
        self.run(q, k, v)
        return self.result[0]

attend = Layer().attend
""",
    "handed to a helper": TAKE
    + """
def first(pair):
    return pair[0]

def attend(q, k, v):
    return first(flash_attn_func(q, k, v))
""",
    "through two helpers and a keyword": TAKE
    + """
def same(*, result=None, other=None):
    return result

def identity(result):
    return result

def attend(q, k, v):
    out, lse = identity(result=flash_attn_func(q, k, v))
    return out
""",
    "lambda": TAKE
    + """
flash = lambda q, k, v: flash_attn_func(q, k, v)
attend = lambda q, k, v: flash(q, k, v)[0]
""",
    "partial": TAKE
    + """
import functools
flash = functools.partial(flash_attn_func, causal=False)

def attend(q, k, v):
    return flash(q, k, v)[0]
""",
    "conditional expression": TAKE
    + """
NEW = True

def attend(q, k, v):
    out = flash_attn_func(q, k, v)[0] if NEW else None
    return out
""",
    "bound, then indexed": TAKE
    + """
def attend(q, k, v):
    out = flash_attn_func(q, k, v)
    out = out[0]
    out = out.contiguous()
    return out
""",
    "bound in one branch": TAKE
    + """
def attend(q, k, v, flash=True):
    if flash:
        result = flash_attn_func(q, k, v)
        out, lse = result
    else:
        result = q.softmax(-1)
        out = result.view(q.shape)
    return out
""",
    "one of two values": TAKE
    + """
def attend(q, k, v):
    out, shape = flash_attn_func(q, k, v)[0], q.shape
    return out.view(shape)
""",
    "star in a tuple": TAKE
    + """
def attend(q, k, v):
    out, lse = *flash_attn_func(q, k, v),
    return out
""",
    "list, next, itemgetter": TAKE
    + """
import operator

def attend(q, k, v):
    a = list(flash_attn_func(q, k, v))[0]
    b = next(iter(flash_attn_func(q, k, v)))
    c = operator.itemgetter(0)(flash_attn_func(q, k, v))
    return (a + b + c) / 3
""",
    "spread over parameters": TAKE
    + """
def finish(out, lse):
    return out

def attend(q, k, v):
    return finish(*flash_attn_func(q, k, v))
""",
    "async": TAKE
    + """
import asyncio

async def flash(q, k, v):
    return flash_attn_func(q, k, v)

async def run(q, k, v):
    out, lse = await flash(q, k, v)
    return out

def attend(q, k, v):
    return asyncio.run(run(q, k, v))
""",
    "by way of the module": """
        import flash_attn_interface

        def attend(q, k, v):
            return flash_attn_interface.flash_attn_func(q=q, k=k, v=v)[0]
        """,
    "varlen": """
        import torch
        from flash_attn_interface import flash_attn_varlen_func

        def attend(q, k, v):
            b, s = q.shape[:2]
            bounds = torch.arange(0, b * s + 1, s, dtype=torch.int32)
            return flash_attn_varlen_func(
                q=q.flatten(0, 1), k=k.flatten(0, 1), v=v.flatten(0, 1),
                cu_seqlens_q=bounds, cu_seqlens_k=bounds, max_seqlen_q=s, max_seqlen_k=s,
                seqused_q=None, seqused_k=None)[0].unflatten(0, (b, s))
        """,
    "packed": """
        import torch
        from flash_attn_interface import flash_attn_qkvpacked_func as packed

        def attend(q, k, v):
            out, softmax_lse = packed(torch.stack((q, k, v), 2))
            return out
        """,
    "one line": "from flash_attn_interface import flash_attn_func as f; attend = lambda q, k, v: f(q, k, v)[0]",
    "match": TAKE
    + """
def attend(q, k, v, mode="three"):
    match mode:
        case "three":
            out = flash_attn_func(q, k, v)
            result = out[0]
        case _:
            out = q
            result = out.view(q.shape)
    return result
""",
    "through torch.utils.checkpoint": TAKE
    + """
from torch.utils.checkpoint import checkpoint

def attend(q, k, v):
    return checkpoint(flash_attn_func, q, k, v, use_reentrant=True)[0]
""",
    "compiled": TAKE
    + """
import torch

def flash(q, k, v):
    return flash_attn_func(q, k, v)

@torch.compile(fullgraph=True, backend="eager")
def attend(q, k, v):
    out, lse = flash(q, k, v)
    return (out + flash_attn_func(q, k, v)[0]) / 2
""",
}

EARLY["exported"] = (
    TAKE
    + """
import torch

class Layer(torch.nn.Module):
    def forward(self, q, k, v):
        out, lse = flash_attn_func(q, k, v)
        return out

def attend(q, k, v):
    for strict in (False, True):
        out = torch.export.export(Layer(), (q, k, v), strict=strict).module()(q, k, v)
        assert out.shape == q.shape
    return out
"""
)

#: Written for today's FlashAttention 3, or for both.
TODAY = {
    "plain": TAKE
    + """
def attend(q, k, v):
    return flash_attn_func(q, k, v).reshape(q.shape)
""",
    "entries of the batch": TAKE
    + """
import torch

def attend(q, k, v):
    out = flash_attn_func(q, k, v)
    return torch.stack([out[b] for b in range(q.shape[0])])
""",
    "the first entry, beside the whole": TAKE
    + """
def attend(q, k, v):
    out = flash_attn_func(q, k, v)
    assert out[0].shape == q.shape[1:]
    return out + 0 * out[0].sum()
""",
    "a batch of one that is made here": TAKE
    + """
import torch

def one(q, k, v):
    return flash_attn_func(q[None], k.unsqueeze(0), v[None])[0]

def attend(q, k, v):
    return torch.stack([one(*entry) for entry in zip(q, k, v)])
""",
    "a batch of one that is made before": TAKE
    + """
import torch

def one(q, k, v):
    q, k, v = (x.unsqueeze(0) for x in (q, k, v))
    return flash_attn_func(q, k, v)[0]

def attend(q, k, v):
    return torch.stack([one(*entry) for entry in zip(q, k, v)])
""",
    "a batch of one that the caller makes": TAKE
    + """
import torch

def one(q, k, v):
    return flash_attn_func(q, k, v)[0]

def attend(q, k, v):
    return torch.stack([one(*(x.unsqueeze(0) for x in entry)) for entry in zip(q, k, v)])
""",
    "asks what it got": TAKE
    + """
def attend(q, k, v):
    out = flash_attn_func(q, k, v)
    return out[0] if isinstance(out, tuple) else out
""",
    "asks for the log-sum-exp": TAKE
    + """
def attend(q, k, v):
    out, lse = flash_attn_func(q, k, v, return_attn_probs=True)
    assert lse.ndim == 3
    return out
""",
    "two entries": TAKE
    + """
import torch

def attend(q, k, v):
    pairs = [torch.stack((x[0], x[-1])) for x in (q, k, v)]
    conditional, unconditional = flash_attn_func(*pairs)
    out = torch.stack([conditional, *q[1:-1], unconditional])
    return out if len(out) == 2 else flash_attn_func(q, k, v)
""",
    "a function that calls back": TAKE
    + """
def attend(q, k, v):
    results = list(map(flash_attn_func, [q], [k], [v]))
    return results[0]
""",
    "compiled": TAKE
    + """
import torch

@torch.compile(fullgraph=True, backend="eager")
def attend(q, k, v):
    return flash_attn_func(q, k, v) + 0
""",
}

#: Early programs in which nothing shows it: they get today's result. docs/cuda-insisting-programs.md lists them.
UNDECIDABLE = {
    "in a container": TAKE
    + """
def attend(q, k, v):
    results = {"flash": flash_attn_func(q, k, v)}
    return results["flash"][0]
""",
    "without its source": """
        namespace = {}
        exec(
            "from flash_attn_interface import flash_attn_func\\n"
            "def attend(q, k, v):\\n    return flash_attn_func(q, k, v)[0]", namespace)
        attend = namespace["attend"]
        """,
    "an index that is not a number": TAKE
    + """
OUT = 0

def attend(q, k, v):
    return flash_attn_func(q, k, v)[OUT]
""",
}
