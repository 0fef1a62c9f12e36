"""Train a recipe: `composer train.py yamls/digits_pss.yaml [key=value ...]`; the same as `pss train`."""

import sys

from pss_composer.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
