"""The two mistakes that are not bugs, and the exit code that each ends with."""


class ConfigError(Exception):
    """The command line or the config asks for something that can't be: exit code 2."""

    exit_code = 2


class RunError(Exception):
    """Something outside the program fails at run time, as a file that can't be read: exit code 1."""

    exit_code = 1
