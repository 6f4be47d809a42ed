"""`python -m gradent` is `gradent`."""

from gradent.cli import main

if __name__ == "__main__":
    main()
