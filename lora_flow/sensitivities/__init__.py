"""How what a run ends with depends on what it begins with: derivatives of losses, alignment and times."""
