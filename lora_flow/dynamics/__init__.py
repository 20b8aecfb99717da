"""The motion of the adapters: the flow, gradient descent, and the observables along the way."""
