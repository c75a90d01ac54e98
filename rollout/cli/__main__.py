"""python -m rollout.cli"""

import sys

from rollout.cli.entry import main

sys.exit(main())
