"""Hostile arguments: every kind of thing that somebody may pass where another kind is meant. For fuzz_arguments.py.

`ANYTHING` makes values for any argument, `OF_A_TENSOR` changes the tensor that a good call has there. They are made
anew for each call, since calls write into some of their arguments.
"""

import warnings
from decimal import Decimal
from fractions import Fraction

import numpy as np
import torch

NAN, INF = float("nan"), float("inf")
DTYPES = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.int8,
    torch.uint8,
    torch.int32,
    torch.int64,
    torch.uint64,
    torch.bool,
    torch.complex32,
    torch.complex64,
)


class _Subclass(torch.Tensor):
    """A tensor of a type of its own, which is no reason to refuse it."""


class _WithoutRepr:
    def __repr__(self):
        raise RuntimeError("no repr")


def quietly(make):
    """Some layouts are announced as prototypes when one is made."""

    def made(*arguments):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return make(*arguments)

    return made


@quietly
def nested(x, layout=torch.strided):
    return torch.nested.nested_tensor([x, x], layout=layout)


@quietly
def quantized(x):
    return torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8)


def _numbers():
    whole = (0, 1, -1, 2, 3, 7, 2**31, 2**63 - 1, 2**63, -(2**63) - 1, 10**30, -(10**30), 10**400, 10**5000)
    real = (0.5, 1.5, -0.25, 3e38, 1e39, -1e39, 1e300, 1e-39, 1e-46, 5e-324, NAN, INF, -INF)
    for number in (*whole, *real, 1 + 1j, complex(NAN, 0), Fraction(1, 3), Decimal("0.5"), Decimal("NaN")):
        yield lambda number=number: number
    for kind in (
        np.float16,
        np.float32,
        np.float64,
        np.int8,
        np.int32,
        np.uint64,
        np.bool_,
        np.complex64,
        np.complex128,
    ):
        yield lambda kind=kind: kind(1)
    for number in (2**63, 1e39, NAN):
        yield lambda number=number: np.array(number)


def _others():
    text = ("", "0.1", "True", "no", "x" * 1000, b"1", np.str_("1"))
    pairs = (
        (),
        (1, 2),
        (1, 2, 3),
        (NAN, 0),
        (None, None),
        ("1", 2),
        (1.0, 2.0),
        (True, False),
        ((1, 2), (3, 4)),
        (1j, 0),
    )
    large = ((10**30, 0), (0, -(10**30)), (2**63 - 1, 2**63 - 1), (-(2**63), 0))
    odd = (range(2), slice(None), Ellipsis, object, len, torch.float16, torch.device("cpu"))
    for value in (None, True, False, *text, *pairs, *large, *odd):
        yield lambda value=value: value
    yield from (
        list,
        lambda: [1],
        lambda: [1, 2],
        lambda: [3, 0],
        lambda: [[1, 2], [3, 4]],
        dict,
        lambda: {"a": 1},
        set,
    )
    yield from (
        object,
        _WithoutRepr,
        lambda: [_WithoutRepr()],
        lambda: iter((1, 2)),
        lambda: np.datetime64("2020-01-01"),
    )
    for value in (1, 1 + 1j, None, True, [1], [1, 2], [], [1.5, NAN], [[1, 2]], ["a", "b"]):
        yield lambda value=value: np.array(value)


def _tensors():
    for dtype in DTYPES:
        for shape in ((), (1,), (2,)):
            yield quietly(lambda dtype=dtype, shape=shape: torch.ones(shape).to(dtype))
    for number in (0.5, -1.0, 1e39, NAN, INF):
        yield lambda number=number: torch.tensor(number)
        yield lambda number=number: torch.tensor(number, dtype=torch.float64)
    for number in (-1, 0, 3, 2**31, 2**63 - 1, -(2**63)):
        yield lambda number=number: torch.tensor(number)
        yield lambda number=number: torch.tensor([number, 0])
    for shape in ((), (1,), (2,), (0,), (2, 2)):
        yield lambda shape=shape: torch.ones(shape, device="meta")
        yield lambda shape=shape: torch.ones(shape, dtype=torch.int32, device="meta")
    yield from (
        lambda: torch.empty(0),
        lambda: torch.empty(0, 0, dtype=torch.int32),
        lambda: torch.ones(()).to_sparse(),
    )
    yield from (lambda: torch.ones((), requires_grad=True), lambda: torch.ones(2, dtype=torch.int64).to_sparse())
    for make in (nested, quantized, lambda x: nested(x, torch.jagged), lambda x: x.to_sparse()):
        yield quietly(lambda make=make: make(torch.ones(2)))
    yield quietly(lambda: quantized(torch.ones(())))
    yield quietly(lambda: torch.ones(2, 2).to_sparse_csr())
    yield lambda: torch.ones(2, 2).to_mkldnn()


ANYTHING = [*_numbers(), *_others(), *_tensors()]


def _of_a_tensor():
    for dtype in DTYPES:
        yield lambda x, dtype=dtype: x.to(dtype)
    yield from (lambda x: x.to("meta"), lambda x: x.tolist(), lambda x: x.numpy(), list, lambda x: -x)
    yield from (lambda x: x[None], lambda x: x[0], lambda x: x[..., 0], lambda x: x.flatten(), lambda x: x[..., None])
    yield from (lambda x: x[:0], lambda x: x[..., :0], lambda x: x[:1], lambda x: x[:-1], lambda x: x[..., 1:])
    yield from (lambda x: x[:, :0], lambda x: x[:, 1:], lambda x: x[..., :1, :], lambda x: torch.cat((x, x)))
    yield from (lambda x: torch.cat((x, x), -1), lambda x: x.mT, lambda x: x.transpose(0, 1), lambda x: x.flip(0))
    yield from (lambda x: x[:1].expand(x.shape), lambda x: x[..., :1].expand(x.shape), lambda x: x.expand(2, *x.shape))
    yield from (lambda x: x + 1, lambda x: x * 1000, lambda x: x - 5, lambda x: x * 0)
    yield from (lambda x: x.fill_(NAN), lambda x: x.fill_(INF), lambda x: x.fill_(1e38), lambda x: x.fill_(2**31 - 1))
    yield from (lambda x: x.to_sparse(), lambda x: x.to_mkldnn(), lambda x: x.requires_grad_(), torch.nn.Parameter)
    yield from (
        lambda x: torch.view_as_real(x + 0j),
        lambda x: (x + 0j).conj().imag,
        lambda x: x.as_subclass(_Subclass),
    )
    yield from (
        nested,
        lambda x: nested(x, torch.jagged),
        quantized,
        lambda x: torch._neg_view(x.double()).to(x.dtype),
        str,
    )


OF_A_TENSOR = [quietly(change) for change in _of_a_tensor()]
