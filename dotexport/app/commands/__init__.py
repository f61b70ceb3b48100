"""The verbs of the command line, by what they are about: one function each, no logic.

Heavy imports wait until a verb needs them.
"""
