"""The initialiser ``transport``: fuses two neighbouring layers by optimal transport (OpT-DeUS, arXiv 2508.08011).

The rows of a matrix are its neurons. Those of the first layer are aligned with the similar rows of the second, and then
both are averaged. Runs on the host in fp64, with two tensors and their transport plans in memory at a time.
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
_THRESHOLD = 1e-9  # error of the marginals
_O_PROJ, _MLP_NORM, _MLP_INPUTS = "self_attn.o_proj.weight", "post_attention_layernorm", ("gate_proj", "up_proj")


class Transport:
    """Computes the tensors of a plan's injected layers.

    Args:
        read: returns a tensor of the base, given the number of the layer and the name within it.

    Attributes:
        facts: the number of transport problems, the most iterations of any, and those that did not converge.

    Raises:
        UsageError: POT is not installed.
    """

    def __init__(self, plan: Plan, read: Callable[[int, str], Any]):
        try:
            # Otherwise POT imports every installed array library.
            for backend in ("PYTORCH", "JAX", "CUPY", "TENSORFLOW"):
                os.environ.setdefault(f"POT_BACKEND_DISABLE_{backend}", "1")
            import ot
        except ImportError:
            raise UsageError("init transport needs POT: pip install POT") from None
        self._ot: Any = ot
        self.plan, self.read = plan, read
        self.facts: dict[str, Any] = {"solved": 0, "most_iterations": 0, "not_converged": []}
        self._o_proj: tuple[int, np.ndarray] | None = None  # the alignment of the current layer

    def __call__(self, number: int, name: str) -> np.ndarray:
        """The tensor ``name`` of grown layer ``number``, fp64, before its row's scale.

        ``gate_proj``, ``up_proj`` and the norm before them read the output of ``o_proj``, so their inputs are aligned
        as its rows are. The input norm is the plain mean.
        """
        a, b = self._neighbours(number, name)
        if a.ndim > 2:
            raise UsageError(f"init transport fuses dense layers, {name} has {a.ndim} dims: use another init")
        if name.startswith(_MLP_NORM):
            a = (a @ self._align_o_proj(number) + a) / 2
        elif a.ndim == 2:
            if any(part in _MLP_INPUTS for part in name.split(".")):
                a = a @ self._align_o_proj(number)
            is_o_proj = name == _O_PROJ
            plan = self._align_o_proj(number) if is_o_proj else self._align(a, b, f"layer {number}: {name}")
            a = plan.T @ a
        return (a + b) / 2

    def _neighbours(self, number: int, name: str) -> tuple[np.ndarray, np.ndarray]:
        before, after = (layer for layer, _ in self.plan.rows[number].sources)
        a, b = (np.asarray(self.read(layer, name)).astype(np.float64) for layer in (before, after))
        return a, b

    def _align_o_proj(self, number: int) -> np.ndarray:
        """The transport plan of ``o_proj``, cached because a layer needs it four times."""
        if self._o_proj is None or self._o_proj[0] != number:
            self._o_proj = number, self._align(*self._neighbours(number, _O_PROJ), f"layer {number}: {_O_PROJ}")
        return self._o_proj[1]

    def _align(self, a: np.ndarray, b: np.ndarray, what: str) -> np.ndarray:
        """Entropic transport plan from the rows of ``a`` to those of ``b``, ``[rows, rows]``.

        Scaled so that columns sum to one: rows that match one to one are permuted.
        """
        n = len(a)
        cost, marginal = self._ot.dist(a, b, metric="euclidean"), np.full(n, 1 / n)
        options = {"numItermax": MAX_ITERATIONS, "stopThr": _THRESHOLD, "log": True, "warn": False}
        # The log domain is fifty times slower, so it is only used if the plain form overflows (and stops early).
        for method in ("sinkhorn", "sinkhorn_log"):
            with np.errstate(all="ignore"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                plan, log = self._ot.sinkhorn(marginal, marginal, cost, REGULARISATION, method=method, **options)
            iterations = int(log["niter"]) + 1
            is_converged = bool(log["err"]) and log["err"][-1] <= _THRESHOLD
            if np.isfinite(plan).all() and (is_converged or iterations >= MAX_ITERATIONS):
                break
        self.facts["solved"] += 1
        self.facts["most_iterations"] = max(self.facts["most_iterations"], iterations)
        if not is_converged:
            self.facts["not_converged"].append(what)
        return plan * n
