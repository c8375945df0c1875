"""`python -m mezo_scale.cli`: the name that job scripts of earlier releases call."""

from mezo_scale.cli import main

main()
