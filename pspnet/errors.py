"""The error that a person can mend: jobs print it without a traceback and exit with 2."""


class InputError(ValueError):
    """What a person gave cannot be used. The message says the rule, the value received and the remedy."""


class MissingPackageError(InputError):
    """A library that is an optional extra is not installed here."""
