"""`python -m alambic`."""

from alambic.cli.main import main

main()
