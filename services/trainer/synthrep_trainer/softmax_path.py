"""Softmax regression at many strengths of L2 regularisation, solved along a path. Pure functions.

For every strength l:  minimise  F(W, b) = l/2 |W|^2 + sum_i CE(softmax(x_i W + b), y_i),  b free.

Strong to weak, each solution starts the next: W is smooth in log l, so a straight line through the
last two solutions predicts the next one well. From there Newton's method, its linear systems solved
by conjugate gradients (CG) with the matrix

    M = X' diag(w) X + l I,      w_i = mean over classes of p_ic (1 - p_ic),

as preconditioner: one D x D Cholesky factor serves all classes. At weak strengths few rows carry
all the curvature; w finds them, which a factor of X'X alone cannot. M costs as much as D / 2C
products with the Hessian, so it is renewed only when CG has spent that much since the last time.

Sums are arranged so that fp32 holds at the weak end, where nearly all p_iy are 1: everything comes
from the probabilities of the other classes, which are small but exact, never from 1 - p_iy.

Legend: N rows, D features and one constant column, C classes; P (N, C) probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor

# Precisions are shares of what is at stake: F, or what F gains over the class frequencies alone if
# that is less, so that classifiers which learn little learn it right (see `_precision`).
# F is l-strongly convex in W, so |dF/dW|^2 / 2l bounds its excess over the minimum; nothing more
# is done where that bound is below CERTIFIED_EXCESS. It is loose at weak strengths, where few
# directions are as flat as l. There Newton stops after a step that promised to lower F by less
# than DECREMENT; the excess that remains is about STEP_PRECISION^2 of that.
CERTIFIED_EXCESS = 1e-6
DECREMENT = 2e-4
STEP_PRECISION = 0.1  # CG stops at this share of the first residual, in the norm of M^-1
MAX_NEWTON_STEPS = 100
MAX_PRODUCTS = 500  # with the Hessian, in one Newton step
_RESOLVED = 1e-15  # share of its largest eigenvalue that an fp64 Gram matrix resolves
LADDER_RATIO = 10.0  # largest jump between strengths; rungs are put in where the caller jumps more
RUNG_DECREMENT = 0.05
_JITTER = 100  # rounding errors, added to each diagonal entry to keep Cholesky factors positive
_SUFFICIENT_DECREASE = 1e-4


@dataclass(frozen=True)
class Solution:
    """The minimiser at one strength, in the coordinates of the given features."""

    strength: float
    weights: Float[Tensor, "dim classes"]
    intercepts: Float[Tensor, " classes"]
    objective: float


def solve_path(
    features: Float[Tensor, "n dim"],
    labels: Int64[Tensor, " n"],
    strengths: Sequence[float],
    *,
    num_classes: int,
) -> Iterator[Solution]:
    """Yield the minimiser for each strength, from the strongest to the weakest, each once.

    Works in the dtype and on the device of `features`. Labels are 0 … num_classes - 1, each
    present. Raises FloatingPointError if a strength cannot be solved to the tolerance.
    """
    problem = _Problem(features, labels, num_classes)
    wanted = sorted(set(strengths), reverse=True)
    before: _Point | None = None
    point = problem.evaluate(problem.prior_only(), max(problem.top_strength, wanted[0]))
    for strength, is_wanted in _ladder(wanted, top=point.strength):
        start = problem.moved_to(strength, point)
        if before is not None and before.strength > point.strength:
            reach = math.log(strength / point.strength) / math.log(point.strength / before.strength)
            ahead = point.weights + reach * (point.weights - before.weights)
            start = min(start, problem.evaluate(ahead, strength), key=lambda p: p.objective)
        before = point
        point = problem.minimise(start, decrement=DECREMENT if is_wanted else RUNG_DECREMENT)
        if is_wanted:
            weights, intercepts = problem.in_given_coordinates(point.weights)
            yield Solution(strength, weights, intercepts, point.objective)


def _ladder(wanted: Sequence[float], *, top: float) -> Iterator[tuple[float, bool]]:
    """(strength, whether the caller wants it), never falling by more than LADDER_RATIO at once."""
    above = top
    for strength in wanted:
        rungs = math.ceil(math.log(above / strength) / math.log(LADDER_RATIO) - 1e-9)
        for rung in range(1, rungs):
            yield above * (strength / above) ** (rung / rungs), False
        yield strength, True
        above = strength


@dataclass(frozen=True)
class _Point:
    """F and what its derivatives need, at one place and strength."""

    strength: float
    weights: Float[Tensor, "d classes"]
    objective: float
    gradient: Float[Tensor, "d classes"]
    probabilities: Float[Tensor, "n classes"]
    other_mass: Float[Tensor, " n"]  # 1 - p_iy, exact


class _Problem:
    """One data set in the coordinates of its principal axes, with a constant column at the end."""

    def __init__(
        self, features: Float[Tensor, "n dim"], labels: Int64[Tensor, " n"], num_classes: int
    ) -> None:
        # Centring only moves the intercept, which is free. The rotation leaves |W| as it is and
        # drops axes without variance; it also scales M well enough for a Cholesky factor in fp32.
        self._mean = features.mean(0)
        centred = features - self._mean
        variances, axes = torch.linalg.eigh(centred.T.double() @ centred.double())
        is_used = variances > variances[-1] * _RESOLVED
        self._axes = axes[:, is_used].to(features.dtype)
        constant = torch.ones_like(features[:, :1])
        self._rows = torch.cat([centred @ self._axes, constant], 1)  # (N, D)
        self._labels = labels[:, None]
        self._num_classes = num_classes
        self._is_regularised = torch.ones_like(self._rows[0])[:, None]
        self._is_regularised[-1] = 0
        self._gram: Tensor | None = None
        self._products_since_gram = 0
        counts = torch.bincount(labels, minlength=num_classes).double()
        self._log_prior = torch.log(counts / counts.sum())
        self._prior_objective = -float((counts * self._log_prior).sum())
        self.top_strength = float(variances[-1]) / 4 + 1e-30  # above it W is nearly 0

    def prior_only(self) -> Float[Tensor, "d classes"]:
        """No weights, and the intercepts that fit the class counts."""
        weights = self._rows.new_zeros(self._rows.shape[1], self._num_classes)
        weights[-1] = self._log_prior
        return weights

    def in_given_coordinates(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (dim, classes) and intercepts (classes,) for the features as they were given."""
        given = self._axes @ weights[:-1]
        return given, weights[-1] - self._mean @ given

    def moved_to(self, strength: float, point: _Point) -> _Point:
        """The same place at another strength, which costs no product with X."""
        penalised = point.weights * self._is_regularised
        change = strength - point.strength
        return replace(
            point,
            strength=strength,
            objective=point.objective + change / 2 * float(penalised.double().square().sum()),
            gradient=point.gradient.add(penalised, alpha=change),
        )

    def minimise(self, point: _Point, *, decrement: float) -> _Point:
        """Newton's method, until the excess is certified or a step promised next to nothing."""
        for _ in range(MAX_NEWTON_STEPS):
            if self._is_certified(point):
                return point
            step = self._newton_step(point)
            promise = -float((point.gradient * step).sum()) / 2
            point, before = self._line_search(point, step, promise), point
            if promise <= self._precision(decrement, point):
                return point
            if point is before:
                break
        raise FloatingPointError(
            f"softmax regression at strength {point.strength:g} got stuck at F = "
            f"{point.objective:g} in {point.weights.dtype}; standardise the features or use float64"
        )

    def _precision(self, share: float, point: _Point) -> float:
        """That share of what is at stake, or the rounding error of F if that is more."""
        at_stake = min(point.objective, self._prior_objective - point.objective)
        rounding = torch.finfo(point.weights.dtype).eps / 10  # of a mean over many rows
        return max(share * at_stake, rounding * point.objective)

    def _is_certified(self, point: _Point) -> bool:
        squares = point.gradient.double().square()
        excess = float(squares[:-1].sum()) / (2 * point.strength)
        if excess > self._precision(CERTIFIED_EXCESS, point):
            return False
        # The intercepts have no strength of their own; their curvature is that of the data.
        curvature = self._spread(point).sum(0).double().clamp(min=torch.finfo(torch.float64).tiny)
        excess += float((squares[-1] / curvature).sum()) / 2
        return excess <= self._precision(CERTIFIED_EXCESS, point)

    def evaluate(self, weights: Tensor, strength: float) -> _Point:
        logits = self._rows @ weights  # (N, C)
        own = logits.gather(1, self._labels)
        logits.scatter_(1, self._labels, -torch.inf)
        top = torch.maximum(logits.amax(1, keepdim=True), own)
        others = logits.sub_(top).exp_()  # 0 at the own class
        other_sum = others.sum(1, keepdim=True)
        own_share = (own - top).exp_()
        total = other_sum + own_share
        losses = torch.where(own >= top, other_sum.log1p(), total.log() - (own - top))
        penalised = weights * self._is_regularised
        objective = float(losses.sum(dtype=torch.float64))
        objective += strength / 2 * float(penalised.double().square().sum())
        other_mass = other_sum / total
        residual = others.div_(total).scatter_(1, self._labels, -other_mass)
        gradient = torch.addmm(penalised, self._rows.T, residual, beta=strength)
        probabilities = residual.scatter_(1, self._labels, own_share / total)
        return _Point(strength, weights, objective, gradient, probabilities, other_mass.squeeze(1))

    def _line_search(self, point: _Point, step: Tensor, promise: float) -> _Point:
        """The first of the step's halves that lowers F enough; `point` itself if none does."""
        length = 1.0
        while length > torch.finfo(step.dtype).eps:
            trial = self.evaluate(point.weights + length * step, point.strength)
            if trial.objective <= point.objective - _SUFFICIENT_DECREASE * length * promise:
                return trial
            length /= 2
        return point

    def _newton_step(self, point: _Point) -> Float[Tensor, "d classes"]:
        """Minus the inverse Hessian times the gradient, by preconditioned CG."""
        factor = self._preconditioner(point)
        step = torch.zeros_like(point.gradient)
        residual = -point.gradient
        direction = scaled = torch.cholesky_solve(residual, factor)
        norm = first_norm = float((residual * scaled).sum())
        for _ in range(MAX_PRODUCTS):
            product = self._hessian_product(point, direction)
            curvature = float((direction * product).sum())
            if not curvature > 0:  # rounding errors are all that is left
                break
            step.add_(direction, alpha=norm / curvature)
            residual = residual.sub(product, alpha=norm / curvature)
            scaled = torch.cholesky_solve(residual, factor)
            previous, norm = norm, float((residual * scaled).sum())
            if norm <= STEP_PRECISION**2 * first_norm:
                break
            direction = scaled + (norm / previous) * direction
        return step

    def _hessian_product(self, point: _Point, direction: Tensor) -> Float[Tensor, "d classes"]:
        self._products_since_gram += 1
        change = self._rows @ direction  # (N, C), of the logits
        change -= change.gather(1, self._labels)
        change -= (point.probabilities * change).sum(1, keepdim=True)
        change *= point.probabilities
        penalised = direction * self._is_regularised
        return torch.addmm(penalised, self._rows.T, change, beta=point.strength)

    def _spread(self, point: _Point) -> Float[Tensor, "n classes"]:
        """p (1 - p) without cancellation where p is nearly 1."""
        own = ((1 - point.other_mass) * point.other_mass)[:, None]
        return (point.probabilities * (1 - point.probabilities)).scatter_(1, self._labels, own)

    def _preconditioner(self, point: _Point) -> Float[Tensor, "d d"]:
        """Cholesky factor of M at this strength; its Gram matrix may be that of an older point."""
        price = self._rows.shape[1] / (2 * self._num_classes)
        if self._gram is None or self._products_since_gram >= price:
            self._gram = (self._rows.T * self._spread(point).mean(1)) @ self._rows
            self._products_since_gram = 0
        ridge = point.strength * self._is_regularised[:, 0] + torch.finfo(self._gram.dtype).tiny
        jitter = _JITTER * torch.finfo(self._gram.dtype).eps
        while True:
            matrix = self._gram + torch.diag(jitter * self._gram.diagonal() + ridge)
            factor, failed = torch.linalg.cholesky_ex(matrix)
            if not failed:
                return factor
            jitter *= 10
