"""`python -m lora_flow_vision` is `lora-flow vision`."""

import sys

from lora_flow.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "vision")
    sys.exit(main())
