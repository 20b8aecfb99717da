"""`python -m lora_flow` is `lora-flow`."""

import sys

from lora_flow.cli import main

if __name__ == "__main__":
    sys.exit(main())
