"""Matrix products whose result is fp32 whatever the operands are.

A CPU has no GEMM of bf16 operands with an fp32 result, so there they are widened; tensor cores
have, but want both operands in bf16.
"""

import torch
from torch import Tensor


def product(a: Tensor, b: Tensor, *, out: Tensor) -> None:
    """Write a @ b to `out`, in its dtype, fp32 or that of both operands.

    Shapes: a [m, k], b [k, n], out [m, n], any of them with one unit stride.
    """
    if out.dtype == a.dtype == b.dtype:
        torch.mm(a, b, out=out)
    elif out.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to `total`, fp32.

    Of fp32 and bf16 operands, a GPU rounds the fp32 one to bf16; a CPU widens the bf16 one.
    Shapes: a [m, k], b [k, n], total [m, n].
    """
    if a.dtype == b.dtype == total.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        a, b = a.to(torch.bfloat16), b.to(torch.bfloat16)
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
