"""exo, whose prefix cache kvferry takes the place of; see `kvferry.cli.exo`.

exo has no plugin mechanism. The launcher replaces the function that exo's supervisor starts
in a new process for every runner; there, what makes the prefix cache is replaced. Written
against exo of June 2026 (0.3.70); what is leaned on is checked first.
"""
