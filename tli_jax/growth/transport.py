"""The initialiser ``transport``: two neighbouring layers fused by optimal transport (OpT-DeUS, arXiv 2508.08011).

Rows of a matrix are its neurons. Those of the layer before are moved to where the like ones of the layer after are, and
both are averaged. Runs on the host, in fp64, with two tensors and their transport plans in memory at a time.
"""

import os
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from tli_jax.errors import UsageError
from tli_jax.growth.plan import Plan

REGULARISATION = 0.06
MAX_ITERATIONS = 10_000
_THRESHOLD = 1e-9  # of the error of the marginals
_RESIDUAL, _MIDDLE_NORM, _FED_BY_IT = "self_attn.o_proj.weight", "post_attention_layernorm", ("gate_proj", "up_proj")


class Transport:
    """Makes one tensor after the other of a plan's injected layers.

    Args:
        read: the tensor of a base layer, by the number of the layer and its name within it.

    Attributes:
        facts: how many transport problems were solved, the most iterations that one took, and which did not converge.

    Raises:
        UsageError: POT is not installed.
    """

    def __init__(self, plan: Plan, read: Callable[[int, str], Any]):
        try:
            # Or it imports every array library that is installed.
            for backend in ("PYTORCH", "JAX", "CUPY", "TENSORFLOW"):
                os.environ.setdefault(f"POT_BACKEND_DISABLE_{backend}", "1")
            import ot
        except ImportError:
            raise UsageError("init transport needs POT: pip install 'tli_jax[transport]'") from None
        self._ot: Any = ot
        self.plan, self.read = plan, read
        self.facts: dict[str, Any] = {"solved": 0, "most_iterations": 0, "not_converged": []}
        self._kept: tuple[int, np.ndarray] | None = None

    def __call__(self, number: int, name: str) -> np.ndarray:
        """The tensor of that name in grown layer ``number``, fp64, its row's scale not yet applied.

        Rows of ``gate_proj`` and ``up_proj``, and the norm before them, see what ``o_proj`` gives: what it moves is
        moved on their input side first. The input norm is the plain mean.
        """
        a, b = self._neighbours(number, name)
        if a.ndim > 2:
            raise UsageError(f"init transport fuses dense layers, {name} has {a.ndim} dims: use another init")
        if name.startswith(_MIDDLE_NORM):
            moved = self._residual(number)
            a = (a @ moved + a) / 2
        elif a.ndim == 2:
            if any(part in _FED_BY_IT for part in name.split(".")):
                a = a @ self._residual(number)
            moved = self._residual(number) if name == _RESIDUAL else self._move(a, b, f"layer {number}: {name}")
            a = moved.T @ a
        return (a + b) / 2

    def _neighbours(self, number: int, name: str) -> tuple[np.ndarray, np.ndarray]:
        before, after = (layer for layer, _ in self.plan.rows[number].sources)
        a, b = (np.asarray(self.read(layer, name)).astype(np.float64) for layer in (before, after))
        return a, b

    def _residual(self, number: int) -> np.ndarray:
        """How ``o_proj`` moves the residual stream; needed three or four times a layer, and kept for that long."""
        if self._kept is None or self._kept[0] != number:
            self._kept = number, self._move(*self._neighbours(number, _RESIDUAL), f"layer {number}: {_RESIDUAL}")
        return self._kept[1]

    def _move(self, a: np.ndarray, b: np.ndarray, what: str) -> np.ndarray:
        """Entropic transport of the rows of ``a`` to those of ``b``, ``[rows, rows]``.

        Rescaled by the marginals, so that columns sum to one: where rows match one to one, it permutes them.
        """
        n = len(a)
        cost, even = self._ot.dist(a, b, metric="euclidean"), np.full(n, 1 / n)
        given = {"numItermax": MAX_ITERATIONS, "stopThr": _THRESHOLD, "log": True, "warn": False}
        # In the log domain only where the plain form is not finite (then it stops early): it takes fifty times as long.
        for method in ("sinkhorn", "sinkhorn_log"):
            with np.errstate(all="ignore"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                moved, log = self._ot.sinkhorn(even, even, cost, REGULARISATION, method=method, **given)
            iterations = int(log["niter"]) + 1
            is_converged = bool(log["err"]) and log["err"][-1] <= _THRESHOLD
            if np.isfinite(moved).all() and (is_converged or iterations >= MAX_ITERATIONS):
                break
        self.facts["solved"] += 1
        self.facts["most_iterations"] = max(self.facts["most_iterations"], iterations)
        if not is_converged:
            self.facts["not_converged"].append(what)
        return moved * n
