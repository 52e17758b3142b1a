"""`python -m umbif`: what torchrun and child processes call."""

from umbif.cli import main

main()
