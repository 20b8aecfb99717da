"""From a layer's gradient to a choice: which start, which size of it, and which rank."""
