"""`python -m gradent` is `gradent`."""

from gradent.cli.app import main

if __name__ == "__main__":
    main()
