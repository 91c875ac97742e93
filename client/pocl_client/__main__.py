"""`python -m pocl_client` is the command `pocl`."""

import sys

from pocl_client.cli import main

if __name__ == "__main__":
    sys.exit(main())
