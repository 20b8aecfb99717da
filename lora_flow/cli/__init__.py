"""The command line: settings in, run folders out. JAX is imported only once a command has work to do."""

from lora_flow.cli.main import main as main
