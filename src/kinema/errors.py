"""What a user is told when something that they gave cannot work."""


class UserError(ValueError):
    """A mistake that the user can mend. The command line prints the message alone, without a traceback.

    The message names the thing, says what was expected and how to mend it.
    """


class ConfigError(UserError):
    """A configuration that does not hold: unknown key, wrong type, values that contradict each other."""
