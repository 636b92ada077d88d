"""impl="reference": the formulas in plain torch, the definition of right."""
