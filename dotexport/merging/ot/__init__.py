"""Discrete optimal transport between neurons: cost, plan, coupling. POT underneath."""
