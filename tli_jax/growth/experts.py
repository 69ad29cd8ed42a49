"""The options by which growth turns dense feed-forwards into experts."""

import dataclasses
import math
import reprlib
from collections.abc import Mapping
from typing import Any

from tli_jax.errors import UsageError, nearest

UPCYCLES = ("copy", "noise", "drop", "virtual_groups", "virtual_groups_published")
# Matrix of a dense feed-forward -> of an expert, as Mixtral calls it.
MATRICES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
# Per layer; far more than in any model.
MAX_EXPERTS = 10_000
_DEFAULT_RATIOS = {"noise": 0.01, "drop": 0.5}


@dataclasses.dataclass(frozen=True)
class Experts:
    """How to turn a dense feed-forward into a mixture of experts.

    Args:
        count: number of experts of the base's size. With ``granularity`` G there are G times as many smaller ones.
        top_k: number of experts per token.
        granularity: number of parts that each feed-forward is split into. More than 1 requires virtual groups.
        upcycle: how experts are initialised:
            ``copy`` (sparse upcycling, arXiv 2212.05055): each is a copy of the feed-forward.
            ``noise``: a copy plus Gaussian noise.
            ``drop`` (drop-upcycling, arXiv 2502.19261): a copy with some of the F hidden units, the same in all three
            matrices, resampled from a normal distribution with their mean and standard deviation.
            ``virtual_groups`` (arXiv 2410.07524): each copy is split into G experts with equal router rows, so that a
            token is routed to all or none of them, and ``down`` is scaled by G.
            ``virtual_groups_published``: the same with the paper's factor (E G²/T)^⅓ on all three matrices, for a
            softmax over all experts. Not exact here.
        ratio: ``noise``: standard deviation relative to each tensor's root mean square, default 0.01. ``drop``:
            fraction of F to resample, default 0.5.
        router_std: the router is sampled from N(0, ``router_std``).
        seed: for everything that is random.

    Raises:
        UsageError: an unknown, out-of-range or conflicting option.
    """

    count: int = 8
    top_k: int = 2
    granularity: int = 1
    upcycle: str = "copy"
    ratio: float | None = None
    router_std: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        G = self.granularity
        if self.upcycle not in UPCYCLES:
            known = f"{nearest(self.upcycle, UPCYCLES)}; use one of {', '.join(UPCYCLES)}"
            raise UsageError(f"upcycle {self.upcycle!r} is not known{known}")
        if self.count < 1 or G < 1:
            raise UsageError(f"experts {self.count}, granularity {G}: both must be 1 or more")
        if self.total > MAX_EXPERTS:
            raise UsageError(
                f"experts {self.count}, granularity {G}: more than {MAX_EXPERTS:,} experts per layer: use fewer"
            )
        if G > 1 and not self.upcycle.startswith("virtual_groups"):
            raise UsageError(
                f"granularity {G} needs upcycle virtual_groups: {self.upcycle} makes experts of the base's size"
            )
        if not 1 <= self.top_k <= self.total or self.top_k % G:
            raise UsageError(f"top_k is {self.top_k}, must be a multiple of granularity {G} and 1…{self.total}")
        if not 0 < self.router_std < math.inf:
            raise UsageError(
                f"router_std is {self.router_std}, must be above 0: ties would always choose the same experts"
            )
        if self.ratio is not None and (self.upcycle not in _DEFAULT_RATIOS or not 0 <= self.ratio <= 1):
            raise UsageError(f"noise_ratio {self.ratio} with upcycle {self.upcycle}: only for noise and drop, 0…1")

    @property
    def total(self) -> int:
        """Experts per layer."""
        return self.count * self.granularity

    @property
    def noise_ratio(self) -> float:
        """``ratio`` or its default."""
        return _DEFAULT_RATIOS.get(self.upcycle, 0.0) if self.ratio is None else self.ratio

    @property
    def is_exact(self) -> bool:
        """Whether the mixture equals the dense model up to rounding."""
        return self.upcycle in ("copy", "virtual_groups") or (self.upcycle in _DEFAULT_RATIOS and self.noise_ratio == 0)

    def expert_size(self, F: int) -> int:
        """Feed-forward size of an expert, given that of the dense layer.

        Raises:
            UsageError: ``granularity`` does not divide it.
        """
        if F % self.granularity:
            raise UsageError(f"granularity {self.granularity} does not divide the feed-forward size {F}: use a divisor")
        return F // self.granularity

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Experts":
        """Read a record of ``to_json``. Raises TypeError or UsageError if it is invalid."""
        types = {"upcycle": (str,), "ratio": (float, int, type(None)), "router_std": (float, int)}
        for field in dataclasses.fields(cls):
            value = record.get(field.name, field.default)
            if type(value) not in types.get(field.name, (int,)):
                raise TypeError(f"experts: {field.name} is {reprlib.repr(value)}")
        return cls(**record)
