"""Derivatives with matrix products of their own, of what stays in float32."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from halfstep.torch import autocast, explain

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]


class Decomposed(nn.Module):
    """A layer, and a decomposition of a matrix that no layer has touched."""

    def __init__(self, decompose):
        super().__init__()
        self.layer, self.decompose = nn.Linear(4, 4), decompose
        scales = torch.diag(torch.logspace(0, -2, 8))
        left, right = (torch.linalg.qr(torch.randn(8, 8))[0] for _ in range(2))
        self.matrix = nn.Parameter(left @ scales @ right)

    def forward(self, x):
        return self.layer(x).sum() + self.decompose(self.matrix).square().sum()


DECOMPOSITIONS = {
    "cholesky": lambda a: torch.linalg.cholesky(a * a + 8 * torch.eye(8)),
    "cholesky twice": lambda a: sum(torch.linalg.cholesky(a + 8 * torch.eye(8)) for _ in "12"),
    "inv": torch.linalg.inv,
    "pinv": torch.linalg.pinv,
    "solve": lambda a: torch.linalg.solve(a, torch.ones(8, 1)),
    "eigh": lambda a: torch.linalg.eigh(a + a.T)[1].abs() * torch.arange(8),
    "svd": lambda a: torch.linalg.svd(a)[0].abs() * torch.arange(8),
    "qr": lambda a: torch.linalg.qr(a)[1],
    "lu": lambda a: torch.linalg.lu(a)[2],
}


@pytest.mark.parametrize("name", DECOMPOSITIONS)
def test_the_derivative_of_a_decomposition_is_float32(name):
    model, x = Decomposed(DECOMPOSITIONS[name]), torch.randn(3, 4)
    model(x).backward()
    reference, model.matrix.grad = model.matrix.grad, None
    autocast(model, backend="aot_eager")(x).backward()
    torch.testing.assert_close(model.matrix.grad, reference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_the_reason_is_told(backend):
    model = Decomposed(torch.linalg.inv)
    rows = explain(model, backend=backend)(torch.randn(3, 4)).rows
    products = [row for row in rows if row.flops]
    stay = [row.why for row in products if row.dtype == "float32"]
    assert len(products) > len(stay) == 2
    assert set(stay) == {
        "left alone: it is the derivative of linalg_inv_ex: the decomposition needs float32"
    }


class Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return (x[:, :, None] * weight).sum(1)  # no product in front, two behind

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight.T, x.T @ grad


def test_products_that_are_taken_apart_and_those_of_a_function_keep_their_derivatives():
    """A row times a matrix is a sum to Inductor, but its derivative is that of a product."""
    layer, weight = nn.Linear(8, 8), torch.randn(8, 8, requires_grad=True)
    for backend, rows, run in (
        ("inductor", 1, lambda x: layer(x).sin()),
        ("aot_eager", 2, lambda x: Own.apply(layer(x), weight)),
    ):
        found = explain(run, backend=backend)(torch.ones(rows, 8, requires_grad=True)).rows
        assert {row.dtype for row in found if row.flops} == {"bfloat16"}, backend


def test_a_product_that_a_key_of_deny_keeps_keeps_its_derivative():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False))
    rows = explain(model, deny=["addmm"], backend="aot_eager")(torch.randn(2, 4)).rows
    by_module = {(row.path, row.dtype) for row in rows if row.flops}
    assert by_module == {("0", "float32"), ("1", "bfloat16")}
