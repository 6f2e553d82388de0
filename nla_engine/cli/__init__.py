"""The command line. Exit codes: 0 done; 1 the work failed; 2 the request is wrong; 141 the output's reader has gone.

Holds no logic of a stage.
"""

from nla_engine.cli import comparisons, pages, stages, stores, studies
from nla_engine.cli.app import app, main

#: The commands as --help lists them: as a user comes to need them.
_ORDER = (
    *("demo", "capture", "roundtrip", "explain", "score", "report"),
    *("ask", "lens", "patch", "controls", "clauses", "claims", "compare", "crossplay", "card", "train"),
    *("info", "verify", "export", "import", "merge", "variance"),
)
app.registered_commands.sort(key=lambda command: _ORDER.index(str(command.name)))

__all__ = ["comparisons", "main", "pages", "stages", "stores", "studies"]
