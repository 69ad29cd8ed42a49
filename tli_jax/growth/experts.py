"""What a growth makes of each layer's feed-forward: experts, of which a router chooses some for each token."""

import dataclasses
import math
import reprlib
from collections.abc import Mapping
from typing import Any

from tli_jax.errors import UsageError, nearest

UPCYCLES = ("copy", "noise", "drop", "virtual_groups", "virtual_groups_published")
# Of a dense layer -> of each expert, by Mixtral's name.
MATRICES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
# Of a layer: far above any model.
MAX_EXPERTS = 10_000
_RATIOS = {"noise": 0.01, "drop": 0.5}


@dataclasses.dataclass(frozen=True)
class Experts:
    """How a dense feed-forward becomes a mixture of experts.

    Args:
        count: experts of the base's size that there would be; with ``granularity`` G they are G times as many.
        top_k: experts that a token goes through.
        granularity: into how many parts the feed-forward is cut, more than 1 with virtual groups only.
        upcycle: ``copy`` (sparse upcycling, arXiv 2212.05055): every expert is the feed-forward. ``noise``: and some
            Gaussian noise. ``drop`` (drop-upcycling, arXiv 2502.19261): in each expert some of F are drawn anew, from
            N(mean, std) of what was there, in all three matrices the same. ``virtual_groups`` (arXiv 2410.07524): each
            copy of the feed-forward is cut in G experts whose router rows are equal, so that all or none of them are
            chosen, and ``down`` is times G; ``virtual_groups_published`` has the paper's factor (E G²/T)^⅓ on all three
            matrices instead, which belongs to a softmax over all experts and is not exact here.
        ratio: ``noise``: of each tensor's root mean square, 0.01 by default; ``drop``: of F, 0.5 by default.
        router_std: the router is drawn from N(0, ``router_std``).
        seed: of all that is drawn.

    Raises:
        UsageError: an option is not known, out of range, or does not go with another.
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
            known = f"{nearest(self.upcycle, UPCYCLES)}; there are {', '.join(UPCYCLES)}"
            raise UsageError(f"upcycle {self.upcycle!r} is not known{known}")
        if self.count < 1 or G < 1:
            raise UsageError(f"experts {self.count}, granularity {G}: both must be 1 or more")
        if self.total > MAX_EXPERTS:
            raise UsageError(
                f"experts {self.count}, granularity {G}: more than {MAX_EXPERTS:,} experts a layer: use fewer"
            )
        if G > 1 and not self.upcycle.startswith("virtual_groups"):
            raise UsageError(
                f"granularity {G} needs upcycle virtual_groups, {self.upcycle} makes experts of the same size"
            )
        if not 1 <= self.top_k <= self.total or self.top_k % G:
            raise UsageError(f"top_k is {self.top_k}, must be a multiple of granularity {G} and 1…{self.total}")
        if not 0 < self.router_std < math.inf:
            raise UsageError(
                f"router_std is {self.router_std}, must be above 0: ties would always choose the same experts"
            )
        if self.ratio is not None and (self.upcycle not in _RATIOS or not 0 <= self.ratio <= 1):
            raise UsageError(f"noise_ratio {self.ratio} with upcycle {self.upcycle}: for noise and drop alone, 0…1")

    @property
    def total(self) -> int:
        """Experts of a layer."""
        return self.count * self.granularity

    def cut(self, F: int) -> int:
        """Feed-forward size of one expert.

        Raises:
            UsageError: ``granularity`` does not divide that of the dense layer.
        """
        if F % self.granularity:
            raise UsageError(f"granularity {self.granularity} does not divide the feed-forward size {F}: use a divisor")
        return F // self.granularity

    @property
    def share(self) -> float:
        """``ratio``, or its default."""
        return _RATIOS.get(self.upcycle, 0.0) if self.ratio is None else self.ratio

    @property
    def is_exact(self) -> bool:
        """Whether the mixture is the dense model but for rounding: equal experts, whose weights sum to 1."""
        return self.upcycle in ("copy", "virtual_groups") or (self.upcycle in _RATIOS and self.share == 0)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Experts":
        """Raises TypeError, UsageError: not what ``to_json`` gives."""
        for field in dataclasses.fields(cls):
            value = record.get(field.name, field.default)
            kinds = {"upcycle": (str,), "ratio": (float, int, type(None)), "router_std": (float, int)}
            if type(value) not in kinds.get(field.name, (int,)):
                raise TypeError(f"experts: {field.name} is {reprlib.repr(value)}")
        return cls(**record)
