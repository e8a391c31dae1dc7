"""Programs whose flash path asks for CUDA, with another path beside it: `attend(q, k, v)`, on the CPU too."""

OTHER = """
import torch.nn.functional as F

def other(q, k, v):
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
"""

TRY = """
try:
    from flash_attn import flash_attn_func
    HAS_FLASH = True
except ImportError:
    HAS_FLASH = False
"""

INSISTING = {
    "Wan": OTHER
    + """
try:
    import flash_attn_interface
    FLASH_ATTN_3_AVAILABLE = True
except ModuleNotFoundError:
    FLASH_ATTN_3_AVAILABLE = False
try:
    import flash_attn
    FLASH_ATTN_2_AVAILABLE = True
except ModuleNotFoundError:
    FLASH_ATTN_2_AVAILABLE = False

def flash_attention(q, k, v):
    assert q.device.type == "cuda" and q.size(-1) <= 256
    if FLASH_ATTN_3_AVAILABLE:
        return flash_attn_interface.flash_attn_func(q, k, v)[0]
    return flash_attn.flash_attn_func(q, k, v)

def attend(q, k, v):
    if FLASH_ATTN_2_AVAILABLE or FLASH_ATTN_3_AVAILABLE:
        return flash_attention(q, k, v)
    return other(q, k, v)
""",
    "in the branch": OTHER
    + TRY
    + """
def attend(q, k, v):
    if HAS_FLASH:
        assert q.is_cuda, "flash attention needs CUDA"
        return flash_attn_func(q, k, v)
    return other(q, k, v)
""",
    "raises": OTHER
    + """
try:
    import flash_attn
except Exception:
    flash_attn = None

def attend(q, k, v):
    if flash_attn is None:
        return other(q, k, v)
    if not q.is_cuda or not k.is_cuda:
        raise RuntimeError("CUDA tensors only")
    return flash_attn.flash_attn_func(q, k, v)
""",
    "a helper": OTHER
    + TRY
    + """
def check(*tensors):
    if any(not t.is_cuda for t in tensors):
        raise ValueError("not on CUDA")

def fast(q, k, v):
    check(q, k, v)
    return flash_attn_func(q, k, v)

def attend(q, k, v):
    return (fast if HAS_FLASH else other)(q, k, v)
""",
    "decorated": OTHER
    + TRY
    + """
import functools

def on_cuda(function):
    @functools.wraps(function)
    def wrapper(q, *rest):
        assert "cuda" in str(q.device)
        return function(q, *rest)
    return wrapper

@on_cuda
def fast(q, k, v):
    return flash_attn_func(q, k, v)

def attend(q, k, v):
    return fast(q, k, v) if HAS_FLASH else other(q, k, v)
""",
    "wrapped in a class": OTHER
    + TRY
    + """
class Flash:
    available = HAS_FLASH

    def __call__(self, q, k, v):
        with F.torch.no_grad() if hasattr(F, "torch") else __import__("contextlib").nullcontext():
            assert all(t.is_cuda for t in (q, k, v))
            return flash_attn_func(q, k, v)

class Plain:
    def __call__(self, q, k, v):
        return other(q, k, v)

attend = Flash() if Flash.available else Plain()
""",
    "find_spec": OTHER
    + """
import importlib.util

HAS_FLASH = importlib.util.find_spec("flash_attn") is not None
if HAS_FLASH:
    from flash_attn.flash_attn_interface import flash_attn_func

def attend(q, k, v):
    if not HAS_FLASH:
        return other(q, k, v)
    if q.device.type != "cuda":
        raise NotImplementedError
    return flash_attn_func(q, k, v)
""",
    "a function that asks": OTHER
    + """
def has_flash():
    try:
        import flash_attn
        return True
    except ImportError:
        return False

AVAILABLE = has_flash()
if AVAILABLE:
    import flash_attn

def attend(q, k, v):
    if AVAILABLE:
        q, k, v = (x.contiguous() for x in (q.cuda(), k.cuda(), v.cuda()))
        return flash_attn.flash_attn_func(q, k, v)
    return other(q, k, v)
""",
    "nested, with a fallback of the same name": OTHER
    + """
try:
    from flash_attn import flash_attn_func
except ImportError:
    def flash_attn_func(q, k, v):
        return other(q, k, v)
else:
    real = flash_attn_func

    def flash_attn_func(q, k, v):
        def inner(q):
            assert (kind := q.device.type) == "cuda", kind
            return real(q, k, v)
        return inner(q)

attend = flash_attn_func
""",
    "metadata": OTHER
    + """
from importlib import metadata
try:
    metadata.version("flash-attn")
    from flash_attn import flash_attn_varlen_func
    USE = True
except (ImportError, metadata.PackageNotFoundError):
    USE = False

def attend(q, k, v):
    if USE:
        import torch
        bounds = torch.tensor([0, q.shape[1]], dtype=torch.int32, device="cuda")
        return flash_attn_varlen_func(q[0], k[0], v[0], bounds, bounds, 1, 1)
    return other(q, k, v)
""",
    "names bound by the answer": OTHER
    + TRY
    + """
if HAS_FLASH:
    def fast(q, k, v):
        assert q.is_cuda
        return flash_attn_func(q, k, v)
    BEST = fast
else:
    BEST = other
MODE = "flash" if HAS_FLASH else "plain"

def attend(q, k, v):
    assert (MODE == "flash") == (BEST is not other)
    return BEST(q, k, v)
""",
}

#: They serve other devices as well, or look themselves: the flash path stays.
OPEN = {
    "allows MPS": TRY
    + """
def attend(q, k, v):
    assert q.device.type in ("cuda", "mps", "cpu")
    return flash_attn_func(q, k, v)
""",
    "looks itself": OTHER
    + TRY
    + """
def attend(q, k, v):
    if HAS_FLASH and q.is_cuda:
        return flash_attn_func(q, k, v)
    return other(q, k, v)
""",
    "commented out": OTHER
    + TRY
    + """
def attend(q, k, v):
    # assert q.device.type == "cuda"
    return flash_attn_func(q, k, v) if HAS_FLASH else other(q, k, v)
""",
    "not on CUDA": OTHER
    + TRY
    + """
def attend(q, k, v):
    assert not q.is_cuda
    return flash_attn_func(q, k, v)
""",
    "for a part of the work": OTHER
    + TRY
    + """
def attend(q, k, v, quantised=False):
    if quantised:
        assert q.is_cuda
    return flash_attn_func(q, k, v)
""",
    "imported without another way": """
        from flash_attn import flash_attn_func

        def attend(q, k, v):
            return flash_attn_func(q, k, v)

        def on_cuda(q, k, v):
            assert q.is_cuda
            return flash_attn_func(q, k, v)
        """,
}

#: The flash path asks for CUDA where nothing shows it: AssertionError, until `MTLFLASHATTN_HIDE` names the module.
UNDECIDABLE = {
    "a helper of another library": OTHER
    + TRY
    + """
def refuse(condition):
    if not condition:
        raise AssertionError

def attend(q, k, v):
    if HAS_FLASH:
        refuse(q.is_cuda)
        return flash_attn_func(q, k, v)
    return other(q, k, v)
""",
}
