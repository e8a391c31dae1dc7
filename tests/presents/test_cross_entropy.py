"""`ops.triton.cross_entropy` and `losses.cross_entropy` against the definition in fp64, alone and over processes."""

import copy
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F

from flash_attn.losses.cross_entropy import CrossEntropyLoss
from flash_attn.ops.triton import cross_entropy
from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

from .reference import assert_close

ROWS, CLASSES = 9, 40
BOOLS = [False, True]


def definition(logits, labels, smoothing=0.0, scale=1.0, lse_square_scale=0.0, ignore_index=-100):
    """`(losses, z_losses)` from the log-softmax, in fp64."""
    logits = logits.double() * scale
    lse = logits.exp().sum(-1).log()
    target = torch.full_like(logits, smoothing / logits.shape[1])
    valid = labels != ignore_index
    target[valid, labels[valid]] += 1 - smoothing
    losses = (target * (lse[:, None] - logits)).sum(-1)
    z_losses = lse_square_scale * lse**2
    return torch.where(valid, losses + z_losses, 0.0), torch.where(valid, z_losses, 0.0)


def problem(dtype=torch.float32, ignore_index=-100):
    logits = (2 * torch.randn(ROWS, CLASSES, dtype=torch.float64)).to(dtype).requires_grad_()
    labels = torch.randint(0, CLASSES, (ROWS,))
    labels[[2, 5]] = ignore_index
    return logits, labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("smoothing", "scale"), [(0.0, 1.0), (0.1, 1.0), (0.0, 0.7), (0.2, 1.3)])
@pytest.mark.parametrize("lse_square_scale", [0.0, 1e-2])
@pytest.mark.parametrize(("ignore_index", "inplace", "blocked"), [(-100, False, True), (3, True, False)])
def test_loss(monkeypatch, dtype, smoothing, scale, lse_square_scale, ignore_index, inplace, blocked):
    if blocked:  # four rows at a time
        monkeypatch.setattr(cross_entropy, "_BLOCK_NUMEL", 4 * CLASSES)
    logits, labels = problem(dtype, ignore_index)
    double = logits.detach().double().requires_grad_()
    want, want_z = definition(double, labels, smoothing, scale, lse_square_scale, ignore_index)
    weight = torch.randn(ROWS, dtype=torch.float64)
    (want_grad,) = torch.autograd.grad(want, double, weight)

    source = logits * 1
    loss, z_loss = cross_entropy_loss(
        source,
        labels,
        label_smoothing=smoothing,
        logit_scale=scale,
        lse_square_scale=lse_square_scale,
        ignore_index=ignore_index,
        inplace_backward=inplace,
    )
    assert loss.dtype == z_loss.dtype == torch.float32
    assert not z_loss.requires_grad
    assert_close(loss, want, scale=4)
    assert_close(z_loss, want_z, scale=4)
    (grad,) = torch.autograd.grad(loss, logits, weight.float())
    assert grad.dtype == dtype
    assert_close(grad, want_grad, scale=4)
    assert torch.equal(source, grad) == inplace
    assert not grad[labels == ignore_index].any()


def test_precomputed_lse():
    logits, labels = problem()
    lse = logits.detach().logsumexp(-1)
    want, _ = cross_entropy_loss(logits, labels)
    got, _ = cross_entropy_loss(logits, labels, lse)
    assert torch.equal(got, want)
    # It is what is used, where it can be.
    shifted, _ = cross_entropy_loss(logits, labels, lse + 1)
    assert_close(shifted, want.double() + (labels != -100), scale=4)
    scaled, _ = cross_entropy_loss(logits, labels, lse + 1, logit_scale=2.0)
    assert_close(scaled, definition(logits, labels, scale=2.0)[0], scale=4)


def test_labels_that_do_not_exist_get_no_loss_but_smoothing():
    """Upstream's convention, which tensor parallelism needs."""
    logits, labels = problem()
    labels[0] = CLASSES
    loss, _ = cross_entropy_loss(logits, labels, label_smoothing=0.1)
    row = logits.detach()[0].double()
    assert_close(loss[0], 0.1 * (row.logsumexp(0) - row.mean()), scale=4)
    assert cross_entropy_loss(logits, labels)[0][0] == 0


def test_equals_torch():
    logits, labels = problem()
    want = F.cross_entropy(logits.double(), labels, label_smoothing=0.1)
    assert_close(CrossEntropyLoss(label_smoothing=0.1)(logits, labels), want, scale=4)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_module(reduction):
    logits, labels = problem()
    module = CrossEntropyLoss(reduction=reduction, lse_square_scale=1e-2, return_z_loss=True)
    assert module.state_dict() == {}
    want = definition(logits, labels, lse_square_scale=1e-2)
    if reduction != "none":
        want = [w.sum() / (ROWS - 2 if reduction == "mean" else 1) for w in want]
    for other in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        for got, w in zip(other(logits, labels), want, strict=True):
            assert_close(got, w, scale=4)
    module.return_z_loss = False
    assert_close(module(logits, labels), want[0], scale=4)


def test_malformed_calls():
    logits, labels = problem()
    with pytest.raises(NotImplementedError, match="reduction must be"):
        CrossEntropyLoss(reduction="max")
    for arguments, message in (
        ((logits[None], labels), "logits must be"),
        ((logits, labels[1:]), "labels must be"),
        ((logits, labels.float()), "labels must be"),
        ((logits, labels, logits), "precomputed_lse must be"),
    ):
        with pytest.raises(ValueError, match=message):
            cross_entropy_loss(*arguments)
    with pytest.raises(ValueError, match="logit_scale must be positive"):
        cross_entropy_loss(logits, labels, logit_scale=0.0)
    loss, _ = cross_entropy_loss(logits, labels)
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(loss.sum(), logits, create_graph=True)


def vocabulary_part(rank, group, logits, labels, options):
    part = logits.chunk(group.size(), dim=1)[rank].clone().requires_grad_()
    loss, z_loss = cross_entropy_loss(part, labels, process_group=group, **options)
    (loss * torch.arange(1.0, ROWS + 1)).sum().backward()
    module = CrossEntropyLoss(process_group=group)
    return loss.detach(), z_loss, part.grad, module(part.detach(), labels)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize(("smoothing", "lse_square_scale"), [*itertools.product((0.0, 0.1), (0.0, 1e-2))])
def test_vocabulary_over_processes(pool, world_size, smoothing, lse_square_scale):
    logits, labels = problem()
    options = {"label_smoothing": smoothing, "logit_scale": 0.9, "lse_square_scale": lse_square_scale}
    double = logits.detach().double().requires_grad_()
    want, want_z = definition(double, labels, smoothing, 0.9, lse_square_scale)
    (want_grad,) = torch.autograd.grad((want * torch.arange(1, ROWS + 1)).sum(), double)
    results = pool.run(world_size, vocabulary_part, logits.detach(), labels, options)
    for loss, z_loss, _, mean in results:
        assert_close(loss, want, scale=4)
        assert_close(z_loss, want_z, scale=4)
        assert_close(mean, definition(double, labels)[0].sum() / (ROWS - 2), scale=4)
    assert_close(torch.cat([grad for _, _, grad, _ in results], dim=1), want_grad, torch.float32, scale=20)


def test_compiles_without_a_break_for_any_length():
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, backend=count)
    def loss(logits, labels):
        return cross_entropy_loss(logits * 2, labels, label_smoothing=0.1)[0].sum()

    for rows in (5, 6, 7, 11):
        logits = torch.randn(rows, CLASSES, requires_grad=True)
        labels = torch.randint(0, CLASSES, (rows,))
        want = definition(logits, labels, 0.1, 2.0)[0].sum()
        got = loss(logits, labels)
        assert_close(got, want, torch.float32, scale=8)
        (grad,) = torch.autograd.grad(got, logits)
        assert_close(grad, torch.autograd.grad(want, logits)[0], torch.float32, scale=8)
    assert len(graphs) <= 2
