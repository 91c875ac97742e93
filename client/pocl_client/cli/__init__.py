"""The command `pocl`. Each module of commands imports what it needs when a command runs: `pocl --help` loads no HTTP
library, no models and nothing of the service."""


def main() -> int:
    """Run the command line; the exit status."""
    from pocl_client.cli.app import run

    return run()
