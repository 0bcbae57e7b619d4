"""``python -m pissa_hub`` and ``torchrun -m pissa_hub``."""

from pissa_hub.cli import main

if __name__ == "__main__":
    main()
