"""A Vision Transformer in Flax NNX that carries the simulator's LoRA adapters and initialisations."""
