"""`python -m paretune` is the `paretune` command."""

from paretune.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    main()
