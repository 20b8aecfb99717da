"""How fast, at equal accuracy, beside whom? `benchmarks.run` measures, `benchmarks.report` tells."""
