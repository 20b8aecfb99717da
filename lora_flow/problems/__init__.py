"""Problems to train: layers, a loss, and the formulas that belong to the loss."""
