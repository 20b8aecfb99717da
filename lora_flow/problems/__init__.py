"""What is trained: layers, a loss, and the formulas that belong to it."""
