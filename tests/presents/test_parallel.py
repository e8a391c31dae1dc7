"""What is computed over a process group equals the same on one process: `utils.distributed`, parallel layers and MLPs.

Every rank builds the whole layer from the same numbers and takes its part. Gradients are compared through the whole:
those of a part with the same part of the whole's, and those of the tokens.
"""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from flash_attn.modules import mlp
from flash_attn.ops import fused_dense
from flash_attn.utils import distributed

from .reference import assert_close

TOKENS, FEATURES, HIDDEN = 8, 6, 16
WORLDS = pytest.mark.parametrize("world_size", [2, 4])


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def part(tensor, rank, world_size, dim=0):
    return tensor.chunk(world_size, dim=dim)[rank]


def collectives(rank, group):
    n = group.size()
    x = (numbers(2 * n, 3) * (rank + 1)).requires_grad_()
    results = {}
    for name in ("all_gather", "reduce_scatter", "all_reduce"):
        before = x.detach().clone()
        out = getattr(distributed, name)(x, group)
        (grad,) = torch.autograd.grad(out, x, numbers(*out.shape, seed=rank if name != "all_reduce" else 5))
        assert torch.equal(x, before)
        results[name] = out.detach(), grad
    raw, handle = distributed.all_gather_raw(x.detach(), group, async_op=True)
    handle.wait()
    results["raw"] = raw
    with pytest.raises(ValueError, match="first axis divisible"):
        distributed.reduce_scatter_raw(x[:-1], group)
    return results


@WORLDS
def test_collectives(pool, world_size):
    n = world_size
    base = numbers(2 * n, 3)
    total = base * sum(range(1, n + 1))
    gathered = torch.cat([base * (r + 1) for r in range(n)])
    results = pool.run(n, collectives)
    weights = sum(numbers(2 * n * n, 3, seed=r) for r in range(n))
    scattered = torch.cat([numbers(2, 3, seed=r) for r in range(n)])
    for rank, result in enumerate(results):
        assert_close(result["all_gather"][0], gathered)
        assert_close(result["raw"], gathered)
        assert_close(result["all_gather"][1], part(weights, rank, n))
        assert_close(result["reduce_scatter"][0], part(total, rank, n))
        assert_close(result["reduce_scatter"][1], scattered)
        assert_close(result["all_reduce"][0], total)
        assert_close(result["all_reduce"][1], numbers(2 * n, 3, seed=5))


def shared_parameters(rank, group):
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(rank)
    model[0].weight._shared_params = True
    model[1].weight._sequence_parallel = model[1].bias._sequence_parallel = True
    distributed.sync_shared_params(model, group)
    for p in model.parameters():
        p.grad = torch.full_like(p, rank + 1)
    distributed.allreduce_sequence_parallel_grad(model, group)
    distributed.allreduce_sequence_parallel_grad(nn.Linear(1, 1), group)
    return [p.detach().unique().tolist() for p in model.parameters()], [
        p.grad.unique().tolist() for p in model.parameters()
    ]


@WORLDS
def test_shared_parameters(pool, world_size):
    total = sum(range(1, world_size + 1))
    for rank, (values, grads) in enumerate(pool.run(world_size, shared_parameters)):
        assert values == [[0], [rank], [rank], [rank]]
        assert grads == [[rank + 1], [rank + 1], [total], [total]]


def test_dim_for_local_rank():
    assert [distributed.get_dim_for_local_rank(10, 4, rank) for rank in range(4)] == [3, 3, 2, 2]
    assert [distributed.get_dim_for_local_rank(24, 4, rank, multiple_of=4) for rank in range(4)] == [8, 8, 4, 4]


def column_then_row(rank, group, sequence_parallel):
    options = {"sequence_parallel": sequence_parallel, "dtype": torch.float64}
    column = fused_dense.ColumnParallelLinear(FEATURES, HIDDEN, group, **options)
    row = fused_dense.RowParallelLinear(HIDDEN, FEATURES, group, **options)
    return run_parallel(rank, group, sequence_parallel, column, row, lambda x: row(torch.tanh(column(x))), gated=False)


def parallel_mlp(rank, group, sequence_parallel, kind):
    options = {"sequence_parallel": sequence_parallel, "dtype": torch.float64}
    if kind == "fused":
        module = fused_dense.ParallelFusedMLP(FEATURES, HIDDEN, process_group=group, checkpoint_lvl=2, **options)
    elif kind == "plain":
        module = mlp.ParallelMLP(FEATURES, HIDDEN, process_group=group, activation=torch.tanh, **options)
    else:
        module = mlp.ParallelGatedMlp(FEATURES, group, HIDDEN, activation=F.silu, multiple_of=8, **options)
    assert list(module.state_dict()) == ["fc1.weight", "fc1.bias", "fc2.weight", *(["fc2.bias"] if rank == 0 else [])]
    return run_parallel(rank, group, sequence_parallel, module.fc1, module.fc2, module, gated=kind == "gated")


def run_parallel(rank, group, sequence_parallel, column, row, call, gated):
    """Load this rank's parts, run on this rank's tokens, and return the result and all gradients."""
    n = group.size()
    w1, b1, w2, b2 = parameters(gated)
    if gated:  # a part holds its y and its gates
        w1, b1 = (torch.cat([part(half, rank, n) for half in t.chunk(2)]) for t in (w1, b1))
    else:
        w1, b1 = part(w1, rank, n), part(b1, rank, n)
    with torch.no_grad():
        column.weight.copy_(w1)
        column.bias.copy_(b1)
        row.weight.copy_(part(w2, rank, n, dim=1))
        if row.bias is not None:
            row.bias.copy_(b2)
    x, grad = numbers(TOKENS, FEATURES), numbers(TOKENS, FEATURES, seed=1)
    if sequence_parallel:
        x, grad = part(x, rank, n), part(grad, rank, n)
    x = x.clone().requires_grad_()
    out = call(x)
    out.backward(grad)
    return out.detach(), x.grad, column.weight.grad, column.bias.grad, row.weight.grad


def parameters(gated):
    hidden = HIDDEN * (2 if gated else 1)
    return (
        numbers(hidden, FEATURES, seed=2),
        numbers(hidden, seed=3),
        numbers(FEATURES, HIDDEN, seed=4),
        numbers(FEATURES, seed=5),
    )


def check_parallel(results, sequence_parallel, activation, gated):
    n = len(results)
    leaves = [t.requires_grad_() for t in (numbers(TOKENS, FEATURES), *parameters(gated))]
    x, w1, b1, w2, b2 = leaves
    out = activation(x @ w1.T + b1) @ w2.T + b2
    dx, dw1, db1, dw2, _ = torch.autograd.grad(out, leaves, numbers(TOKENS, FEATURES, seed=1))
    for rank, (got, got_dx, got_dw1, got_db1, got_dw2) in enumerate(results):
        assert_close(got, part(out, rank, n) if sequence_parallel else out)
        assert_close(got_dx, part(dx, rank, n) if sequence_parallel else dx, scale=10)
        assert_close(got_dw2, part(dw2, rank, n, dim=1), scale=10)
        for g, w in ((got_dw1, dw1), (got_db1, db1)):
            want = torch.cat([part(half, rank, n) for half in w.chunk(2)]) if gated else part(w, rank, n)
            assert_close(g, want, scale=10)


@WORLDS
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_parallel_linear(pool, world_size, sequence_parallel):
    results = pool.run(world_size, column_then_row, sequence_parallel)
    check_parallel(results, sequence_parallel, torch.tanh, gated=False)


@WORLDS
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize(
    ("kind", "activation"),
    [
        ("fused", lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))),
        ("plain", torch.tanh),
        ("gated", lambda x: x.chunk(2, -1)[0] * x.chunk(2, -1)[1] * torch.sigmoid(x.chunk(2, -1)[1])),
    ],
)
def test_parallel_mlp(pool, world_size, sequence_parallel, kind, activation):
    results = pool.run(world_size, parallel_mlp, sequence_parallel, kind)
    check_parallel(results, sequence_parallel, activation, gated=kind == "gated")


def uneven_parts(rank, group):
    column = fused_dense.ColumnParallelLinear(3, 24, group, multiple_of=4)
    row = fused_dense.RowParallelLinear(24, 3, group, multiple_of=4)
    with pytest.raises(ValueError, match="out_features must be a multiple of 5, got 24"):
        fused_dense.ColumnParallelLinear(3, 24, group, multiple_of=5)
    with pytest.raises(ValueError, match="in_features must be a multiple of 5"):
        fused_dense.RowParallelLinear(24, 3, group, multiple_of=5)
    assert dist.get_world_size(group) == 4
    return column.weight.shape, row.weight.shape, row.bias is not None


def test_uneven_parts(pool):
    for rank, (column, row, bias) in enumerate(pool.run(4, uneven_parts)):
        features = 8 if rank < 2 else 4
        assert column == (features, 3)
        assert row == (3, features)
        assert bias == (rank == 0)


def test_a_process_group_is_needed():
    with pytest.raises(ValueError, match="process_group must be given"):
        fused_dense.ParallelFusedMLP(4)
