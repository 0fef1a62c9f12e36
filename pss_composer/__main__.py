"""`python -m pss_composer` is the command `pss`."""

from pss_composer.cli import main

if __name__ == "__main__":
    main()
