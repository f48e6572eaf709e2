"""`poweropd inspect` as a script of a checkout: python checkpoints_tools/inspect.py --help"""

import os
import sys

# Beside this file lies inspect.py, which must not stand in for the standard library's.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from poweropd_megatron.cli.main import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(["inspect", *sys.argv[1:]]))
