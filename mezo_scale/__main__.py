"""`python -m mezo_scale`"""

from mezo_scale.cli import main

main()
