"""`python -m nla_engine.bench`: how fast each part is, beside the limit of the hardware and what else there is.

Uses the package as its users do. Nothing outside this directory knows of it.
"""
