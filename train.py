"""Train a recipe: `composer train.py yamls/digits_pss.yaml [key=value ...]`."""

from pss_composer.training import main

if __name__ == "__main__":
    main()
