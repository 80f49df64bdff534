"""Budgets: what bits and ranks cost, what they lose, and the choice per layer that loses least."""

from .allocate import Option, allocate
from .cost import Choice, check_budget, layer_choices, network_choices, stored_bits

__all__ = ["Choice", "Option", "allocate", "check_budget", "layer_choices", "network_choices", "stored_bits"]
