"""`python -m nla_engine` is `nla-engine`."""

from nla_engine.cli import main

main()
