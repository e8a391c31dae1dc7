"""Programs that call `unpad_input`: `run(x, mask)` gives (tokens, indices, cu_seqlens, max_seqlen)."""

TAKE = "from flash_attn.bert_padding import unpad_input\n"

#: Written before flash-attn 2.7, when it returned four values.
FOUR = {
    "unpacked": TAKE
    + """
def run(x, mask):
    tokens, indices, cu_seqlens, max_seqlen = unpad_input(x, mask)
    return tokens, indices, cu_seqlens, max_seqlen
""",
    "names that are not used": TAKE
    + """
def run(x, mask):
    kv, _, bounds, longest = unpad_input(x, mask)
    return kv, _, bounds, longest
""",
    "decorated": TAKE
    + """
import functools, torch

def counted(function):
    @functools.wraps(function)
    def wrapper(*args):
        wrapper.calls += 1
        return function(*args)
    wrapper.calls = 0
    return wrapper

@counted
@torch.no_grad()
def unpad(x, mask):
    return unpad_input(x, mask)

def run(x, mask):
    a, b, c, d = unpad(x, mask)
    return a, b, c, d
""",
    "nested": TAKE
    + """
def run(x, mask):
    def pack(tensor):
        return unpad_input(tensor, mask)
    (a, b, c, d) = pack(x)
    return [a, b, c, d]
""",
    "walrus": TAKE
    + """
def run(x, mask):
    if (packed := unpad_input(x, mask)) is not None:
        a, b, c, d = packed
    return a, b, c, d
""",
    "star in a tuple": TAKE
    + """
def run(x, mask):
    a, b, c, d = *unpad_input(x, mask),
    return a, b, c, d
""",
    "beside other values": TAKE
    + """
def run(x, mask):
    batch, a, b, c, d = x.shape[0], *unpad_input(x, mask)
    return a, b, c, d
""",
    "wrapped in a class": TAKE
    + """
class Padding:
    def __init__(self, function=unpad_input):
        self.function = function

    def pack(self, x, mask):
        return self.function(x, mask)

class Layer:
    padding = Padding()

    def run(self, x, mask):
        a, b, c, d = self.padding.pack(x, mask)
        return a, b, c, d

run = Layer().run
""",
    "handed to a helper": TAKE
    + """
def take(packed):
    a, b, c, d = packed
    return a, b, c, d

def run(x, mask):
    return take(unpad_input(x, mask))
""",
    "spread over parameters": TAKE
    + """
class Layer:
    def attend(self, tokens, indices, cu_seqlens, max_seqlen):
        return tokens, indices, cu_seqlens, max_seqlen

    def run(self, x, mask):
        return self.attend(*unpad_input(x, mask))

run = Layer().run
""",
    "bound, then unpacked": TAKE
    + """
def run(x, mask):
    result = unpad_input(x, mask)
    assert len(result[0]) == int(mask.sum())
    a, b, c, d = result
    return a, b, c, d
""",
    "stored in self": TAKE
    + """
class Layer:
    def run(self, x, mask):
        self.packed = unpad_input(x, mask)
        return self.finish()

    def finish(self):
        a, b, c, d = self.packed
        return a, b, c, d

run = Layer().run
""",
    "list": TAKE
    + """
def run(x, mask):
    a, b, c, d = list(unpad_input(x, mask))
    return a, b, c, d
""",
    "lambda": TAKE
    + """
pack = lambda x, mask: unpad_input(x, mask)

def run(x, mask):
    a, b, c, d = pack(x, mask)
    return a, b, c, d
""",
    "by way of the module": """
        from flash_attn import bert_padding

        def run(x, mask):
            a, b, c, d = bert_padding.unpad_input(
                x,
                mask,
            )
            return a, b, c, d
        """,
    "in try, with annotations": """
        try:
            from flash_attn.bert_padding import unpad_input
        except ImportError:
            unpad_input = None

        def run(x, mask):
            packed: tuple = unpad_input(x, mask)
            try:
                a, b, c, d = packed
            finally:
                pass
            return a, b, c, d
        """,
}

#: Written for five values, or for any number.
FIVE = {
    "unpacked": TAKE
    + """
def run(x, mask):
    a, b, c, d, used = unpad_input(x, mask)
    assert used.tolist() == mask.sum(1).tolist()
    return a, b, c, d
""",
    "star": TAKE
    + """
def run(x, mask):
    a, b, *rest = unpad_input(x, mask)
    assert len(rest) == 3
    return a, b, *rest[:2]
""",
    "sliced": TAKE
    + """
def run(x, mask):
    a, b, c, d = unpad_input(x, mask)[:4]
    return a, b, c, d
""",
    "indexed": TAKE
    + """
def run(x, mask):
    result = unpad_input(x, mask)
    return result[0], result[1], result[2], result[3]
""",
    "either": TAKE
    + """
def run(x, mask):
    result = unpad_input(x, mask)
    if len(result) == 5:
        a, b, c, d, _ = result
    else:
        a, b, c, d = result
    return a, b, c, d
""",
}

#: Programs for four values in which nothing shows it: they get five. docs/cuda-insisting-programs.md lists them.
UNDECIDABLE = {
    "the last one": TAKE
    + """
def run(x, mask):
    *packed, longest = unpad_input(x, mask)
    return *packed, longest
""",
    "in a comprehension": TAKE
    + """
def run(x, mask):
    return [(a, b, c, d) for a, b, c, d in [unpad_input(x, mask)]][0]
""",
}
