"""What moves the adapters: the flow, gradient descent, and what is read off along the way."""
