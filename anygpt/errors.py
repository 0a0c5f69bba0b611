"""The one exception for mistakes that the user can mend."""


class InputError(ValueError):
    """Something that was given to us is wrong: a setting, a file, a shape, a count.

    The message is one sentence for a person: what was wrong, where (file, line, row, key), what was
    expected, and how to mend it. The command-line tools print it alone, without a traceback; everything
    else that goes wrong is a fault of the program and keeps its traceback.
    """
