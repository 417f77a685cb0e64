"""How much a student differs from its teacher: without data (fidelity), and with labelled data (accuracy)."""
