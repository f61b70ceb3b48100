"""How a transport plan is found: what can be asked for."""

from __future__ import annotations

from dataclasses import dataclass

from dotexport.errors import UsageError
from dotexport.options import option

PLANS = ("semi-relaxed", "balanced")


@dataclass(frozen=True, kw_only=True)
class TransportOptions:
    """How a plan is found.

    Attributes:
        plan: `semi-relaxed` fixes the mass of the sources only; `balanced` asks for uniform mass
            on the targets too, which forces N/K - 1 units of foreign mass into every target.
        epsilon: entropic regularisation, in units of the largest cost; 0 solves exactly.
        max_steps: Sinkhorn iterations.
    """

    plan: str = option(
        "semi-relaxed", help="Transport plan: semi-relaxed or balanced.", flag="transport"
    )
    epsilon: float = option(0.05, help="Entropic regularisation of the plan; 0 is exact.")
    max_steps: int = 2000

    def __post_init__(self) -> None:
        if self.plan not in PLANS:
            raise UsageError(f"transport must be one of {', '.join(PLANS)}, not {self.plan!r}")
        if not 0 <= self.epsilon <= 10:
            raise UsageError(f"epsilon must lie between 0 and 10, not {self.epsilon}")
