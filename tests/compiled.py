"""torch.compile as the tests use it: one graph or an error, and a count of how often one was made."""

import torch
from torch._dynamo.testing import CompileCounterWithBackend

LENGTHS = (5, 9, 33)
GRAPHS = 2  # one for the first length, one for all others: the length is found to vary


def compiled(function, backend="aot_eager", **how):
    """(`function` compiled as one graph, a counter whose `frame_count` says how many graphs were made)."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, fullgraph=True, backend=counter, **how), counter


def outcome(function, arguments, parameters=()):
    """Tensors that `function` gives and the gradients of what requires one, under a fixed seed.

    Each run has its own copies of the arguments: they may be written to.
    """
    leaves = [x.detach().clone().requires_grad_(x.requires_grad) if torch.is_tensor(x) else x for x in arguments]
    # Not the leaves themselves: in-place functions may not write to these.
    given = [x.view_as(x) if torch.is_tensor(x) and x.requires_grad else x for x in leaves]
    torch.manual_seed(3)
    out = function(*given)
    out = [x for x in (out if isinstance(out, tuple) else (out,)) if torch.is_tensor(x)]
    wanted = [x for x in leaves if torch.is_tensor(x) and x.requires_grad] + list(parameters)
    through = [x for x in out if x.requires_grad]
    grads = []
    if wanted and through:
        weights = [torch.linspace(0.1, 1.0, x.numel()).view(x.shape) for x in through]
        total = sum((x.float() * weight).sum() for x, weight in zip(through, weights, strict=True))
        grads = torch.autograd.grad(total, wanted, allow_unused=True)
    written = [x for x in leaves if torch.is_tensor(x) and not x.requires_grad]
    return [*out, *(torch.zeros(()) if x is None else x for x in grads), *written]


def assert_one_graph(function, make, backend="aot_eager", lengths=LENGTHS, tolerance=1e-5, **how):
    """`function(*make(n))`, compiled, gives what it gives as it is, for all lengths n, with one graph for them."""
    parameters = list(function.parameters()) if isinstance(function, torch.nn.Module) else []
    fast, counter = compiled(function, backend, **how)
    for n in lengths:
        arguments = make(n)
        expected, got = outcome(function, arguments, parameters), outcome(fast, arguments, parameters)
        for mine, wanted in zip(got, expected, strict=True):
            assert mine.requires_grad == wanted.requires_grad
            torch.testing.assert_close(mine, wanted, rtol=tolerance, atol=tolerance, equal_nan=True)
    assert counter.frame_count <= GRAPHS, f"{counter.frame_count} graphs for {len(lengths)} lengths"
