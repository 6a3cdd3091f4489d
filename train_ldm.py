"""python train_ldm.py --config configs/ldm/scenes.yaml autoencoder=CKPT, as `ldm train-ldm`."""

import sys

from ldm.cli import main

if __name__ == "__main__":
    sys.exit(main(["train-ldm", *sys.argv[1:]]))
