"""``python -m halfstep.cli``: what the script ``halfstep`` runs."""

from . import main

if __name__ == "__main__":
    main()
