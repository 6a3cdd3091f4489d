"""python train_autoencoder.py --config configs/autoencoder/kl_f8.yaml data.root=DIR, as `ldm train-autoencoder`."""

import sys

from ldm.cli import main

if __name__ == "__main__":
    sys.exit(main(["train-autoencoder", *sys.argv[1:]]))
