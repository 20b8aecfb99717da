"""What a run should begin with, and what it began with: searches and fits through the flow."""
