"""python sample.py --prompt "..." --cfg 7.5, the same as `ldm sample`."""

import sys

from ldm.cli import main

if __name__ == "__main__":
    sys.exit(main(["sample", *sys.argv[1:]]))
