"""Formulas that need no data and no optimisation: pure functions of tensors, one subject per file."""
