"""``python -m conv2former_cli``, for torchrun and srun."""

from conv2former_cli import main

if __name__ == "__main__":
    main()
