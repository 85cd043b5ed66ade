"""``python -m kinema``, which torchrun starts on every rank."""

from kinema.cli import main

main()
