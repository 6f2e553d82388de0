"""The command line. Exit codes: 0 done; 1 the work failed; 2 the request is wrong; 141 the output's reader has gone.

Holds no logic of a stage.
"""

from nla_engine.cli import comparisons, pages, stages, stores, studies
from nla_engine.cli.app import main

__all__ = ["comparisons", "main", "pages", "stages", "stores", "studies"]
