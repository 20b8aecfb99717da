"""Other people's models: checkpoints and gradients in, adapters in PEFT's layout out."""
