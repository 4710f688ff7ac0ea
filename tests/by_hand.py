"""What updates are compared with, independent of the rules in zerograph: torch.optim, and papers' formulas.

Nothing here reads a rule's body or its host scalars.
"""

from typing import Any

import torch
from torch import Tensor

from tests.kernels import F32
from tests.updates import Problem, Slice


def torchs(problem: Problem, dtype: torch.dtype) -> Slice:
    """What torch.optim makes of it, unfused."""
    case = problem.case
    param = torch.nn.Parameter(problem.first.to(dtype, copy=True))
    options = {k: v for k, v in case.full.items() if k != "bias_correction"}  # not one of torch's
    optimizer = getattr(torch.optim, case.optimizer)([param], foreach=False, **options)
    for grad in problem.grads:
        param.grad = grad.to(dtype) * problem.factor
        optimizer.step()
    names = case.described.states(case.full)
    return Slice(param.detach(), {n: optimizer.state[param][n] for n in names})


def lion(problem: Problem, dtype: torch.dtype) -> Slice:
    """arXiv:2302.06675 algorithm 2, in torch operations of which each rounds once."""
    options = problem.case.full
    (beta1, beta2), lr = options["betas"], options["lr"]
    theta, m = problem.first.to(dtype, copy=True), torch.zeros(problem.size, dtype=dtype)
    for grad in problem.grads:
        g = grad.to(dtype) * problem.factor
        direction = m.mul(beta1).add_(g, alpha=1 - beta1).sign_()
        theta.mul_(1 - lr * options["weight_decay"]).add_(direction, alpha=-lr)
        m.mul_(beta2).add_(g, alpha=1 - beta2)
    return Slice(theta, {"exp_avg": m})


def honest(problem: Problem, dtype: torch.dtype = F32) -> Slice:
    """torch.optim where torch has the rule, else the formula in torch operations."""
    return torchs(problem, dtype) if problem.case.optimizer else lion(problem, dtype)


def lamb(params: list[Tensor], grads: list[list[Tensor]], options: dict[str, Any]) -> Slice:
    """arXiv:1904.00962 algorithm 2 on whole parameters, in float64; they follow each other in the slice."""
    beta1, beta2 = options["betas"]
    xs = [p.double() for p in params]
    ms, vs = ([torch.zeros_like(x) for x in xs] for _ in range(2))
    for step, given in enumerate(grads, 1):
        for i, grad in enumerate(given):
            g = grad.double()
            ms[i] = beta1 * ms[i] + (1 - beta1) * g
            vs[i] = beta2 * vs[i] + (1 - beta2) * g * g
            m, v = ms[i] / (1 - beta1**step), vs[i] / (1 - beta2**step)
            change = m / (v.sqrt() + options["eps"]) + options["weight_decay"] * xs[i]
            ratio = (xs[i].norm() / change.norm()).clamp(options["min_coeff"], options["max_coeff"])
            if xs[i].norm() == 0 or change.norm() == 0:
                ratio = xs[i].new_ones(())
            xs[i] = xs[i] - options["lr"] * ratio * change
    master, first, second = map(torch.cat, (xs, ms, vs))
    return Slice(master, {"exp_avg": first, "exp_avg_sq": second})
