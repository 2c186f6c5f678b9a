"""`python -m vclipseg`, which is how `torchrun` starts it too."""

from vclipseg.cli import main

if __name__ == "__main__":
    main()
