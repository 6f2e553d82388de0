"""`python -m nla_engine.bench`: how fast each part is, compared with the hardware's limit and with other libraries.

It uses the package as a user would. Nothing outside this directory imports it.
"""
