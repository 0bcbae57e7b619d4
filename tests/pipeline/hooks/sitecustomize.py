"""With this folder on PYTHONPATH, Python runs this first: every process of a watched run, whoever starts it."""

import os

if "WATCH" in os.environ:
    from tests.pipeline.watch import Watch

    Watch.of_environment().enter()
