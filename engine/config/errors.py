"""The two mistakes that are not bugs, and the exit code that each ends with."""


class ConfigError(Exception):
    """The command line or the config asks for something that can't be: exit code 2."""

    exit_code = 2
    is_of_all_ranks = True  # each finds the same mistake, so one says it


class RunError(Exception):
    """Something outside the program fails at run time, as a file that can't be read: exit code 1."""

    exit_code = 1
    is_of_all_ranks = False
