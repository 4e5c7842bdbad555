"""First seed of tests that damage files at random: 0, so that runs repeat; another one searches further.

FIRST_SEED=12000 tools/test tests/checkpoint/test_corruption.py
"""

import os

FIRST_SEED = int(os.environ.get("FIRST_SEED", "0"))
